"""Commands that write a model, ended by a signal."""

import json
import signal

import pytest
from compass_helpers import compass_model
from quantization_helpers import needs_compressed_tensors

from otpo.cli.main import main


@needs_compressed_tensors
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal")
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_run_that_is_ended_leaves_nothing(tmp_path, monkeypatch, capsys, request, number, code):
    number = getattr(signal, number)
    usual = signal.signal(number, signal.SIG_DFL)  # `nohup` ignores one
    request.addfinalizer(lambda: signal.signal(number, usual))

    def ended(*args, **options):
        assert signal.getsignal(number) is not signal.SIG_DFL  # which would end the tests
        assert [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        signal.raise_signal(number)
        pytest.fail("it went on")

    folder, served, data = (str(tmp_path / name) for name in ("compass", "served", "ids.jsonl"))
    compass_model().save_pretrained(folder)
    with open(data, "w") as file:
        file.writelines(json.dumps({"input_ids": [3, 4 + n]}) + "\n" for n in range(3))
    assert main(["export", folder, served]) == 0
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr("otpo.cli.quantizing.run.write_folder", ended)
    monkeypatch.setattr("moe_backbone.conversion.exporting.write_weights", ended)
    for command, words in (
        ("quantize", [served, "--dataset_name", data, "--skip_report"]),
        *(("quantize", [folder, "--dataset_name", data, "--skip_report"]), ("export", [folder]), ("import", [served])),
    ):
        with pytest.raises(SystemExit) as raised:
            main([command, words[0], str(tmp_path / "out"), *words[1:]])
        assert raised.value.code == code and {path.name for path in tmp_path.iterdir()} == before
        assert f"otpo {command}: ended by {number.name}" in capsys.readouterr().err
        assert signal.getsignal(number) is signal.SIG_DFL
