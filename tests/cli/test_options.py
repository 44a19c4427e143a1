"""The command line that others script against: names of commands, arguments and options."""

from __future__ import annotations

import typer

from fewstep.cli.main import app

FROZEN = {
    "demo": "--out --full --quiet --json",
    "train": "recipe overrides --out --resume --stage --quiet --json",
    "sample": "model --n -n --seed --out --steps --guidance --labels --prompt --length --format "
    "--noise-scale --cath --attention --offload --trust-remote-code --json",
    "evaluate": "model --metrics --protocol --prompts --n -n --features --reference --reward --steps --teacher --guidance "
    "--seed --batch --out --length --noise-scales --compared --design --fold --json",
    "compare": "a b --json",
    "export": "run --to --checkpoint --lora-layout --push --private --yes --json",
    "convert": "file --to --steps --noise-scale --prefix --order --json",
    "plan": "recipe overrides --json --memory",
    "doctor": "model --json",
    "methods": "--json",
    "report": "run --out --json",
}


def test_commands_arguments_and_options_are_those_that_scripts_know():
    commands = typer.main.get_command(app).commands
    assert {name: " ".join(o for p in c.params for o in p.opts) for name, c in commands.items()} == FROZEN


def test_global_options_are_version_and_debug():
    assert [o for p in typer.main.get_command(app).params for o in p.opts] == ["--version", "--debug"]


def test_every_command_and_option_is_explained():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        assert all(p.help for p in command.params), name
