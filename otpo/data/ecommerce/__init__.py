"""The generator of the bundled preference pairs: `python -m otpo.data.ecommerce.generate`."""
