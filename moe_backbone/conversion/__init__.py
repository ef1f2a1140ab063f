"""Compass checkpoints in the forms that other software reads, and such checkpoints as Compass ones.

[`export_model`][moe_backbone.conversion.exporting.export_model] and
[`import_model`][moe_backbone.conversion.importing.import_model] do the work, tensor by tensor; `targets` and `sources`
say which configurations are equal.
"""
