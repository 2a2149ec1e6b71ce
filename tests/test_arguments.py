"""Numbers of the command line are held to their range, and a mistake is one line."""

import importlib

import pytest

from backbench.common.cli.main import arguments as backbench

COMMANDS = {
    "pretrain.run": (),
    "pretrain.evaluate": ("--backbone", "b"),
    "pretrain.robustness": ("--backbone", "b"),
    "detection.finetune": ("--backbone", "b"),
    "captioning.finetune": ("--backbone", "b"),
    "captioning.evaluate": ("--annotations", "a", "--results", "b"),
    "wsol.finetune": ("--backbone", "b"),
    "wsol.evaluate": ("--scoremaps", "s"),
    "wsol.predict": ("--run", "r"),
}


@pytest.mark.parametrize(
    ("command", "option", "low"),
    [
        *((name, "--workers", 0) for name in COMMANDS if name.endswith(("run", "finetune"))),
        *((name, "--limit", 0) for name in COMMANDS if name.startswith("pretrain") or "finetune" in name),
        *((name, "--seed", 0) for name in ("pretrain.run", "pretrain.robustness", "wsol.predict")),
        *(("wsol.evaluate", option, 1) for option in ("--size", "--resize", "--crop")),
        ("captioning.evaluate", "--timeout", 0.001),
        *(("demo", option, 1) for option in ("--seeds", "--slots")),
        *(("run", option, 1) for option in ("--seeds", "--slots")),
        ("run", "--limit", 0),
    ],
)
def test_a_number_out_of_its_range_is_one_line(capsys, command, option, low):
    if command in COMMANDS:
        parser, given = importlib.import_module(command).arguments(), COMMANDS[command]
    else:
        parser, given = backbench(command), (command,)
    for text in ("-1", "nan", "1e400", "", "four", "²"):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([*given, option, text])
        line = capsys.readouterr().err
        assert ended.value.code == 2 and line.count("\n") == 1
        assert line.startswith(f"error: argument {option}: {text}: a ") and "is needed (see " in line
    parsed = parser.parse_args([*given, option, str(low)])
    assert getattr(parsed, option.strip("-")) == low
