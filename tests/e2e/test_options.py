"""What all commands share: common options, names in the environment, logs, and completion in the shell."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from moemerge.cli.app import app
from moemerge.cli.schema import EXIT_CODES
from tests.e2e.program import call_program
from tests.factories import write_checkpoint

ROOT = Path(__file__).parents[2]
PROGRAM = typer.main.get_command(app)
COMMANDS = PROGRAM.commands
SHARED = {
    **{option: f"MOEMERGE_{option.upper()}" for option in ("json", "quiet", "verbose", "offline")},
    **{"device": "MOEMERGE_DEVICE", "engine": "MOEMERGE_ENGINE", "max-ram": "MOEMERGE_MAX_RAM"},
    "address": "RAY_ADDRESS",
}
"""Options with one name for all commands."""


def options_of(command):
    """Options by their first long name."""
    params = [param for param in command.params if param.param_type_name == "option"]
    return {next(name for name in param.opts if name.startswith("--"))[2:]: param for param in params}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_common_options(name):
    options = options_of(COMMANDS[name])
    assert {"json", "quiet", "verbose"} <= options.keys()
    assert "-q" in options["quiet"].opts
    assert options.get("variant", options["quiet"]).opts[-1] in ("-v", "-q"), (
        "behind a command -v is a variant"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_name_in_the_environment(name):
    for option, param in options_of(COMMANDS[name]).items():
        by_rule = f"MOEMERGE_{name}_{option}".replace("-", "_").upper()
        assert param.envvar == SHARED.get(option, by_rule)


def test_shared_names_are_documented():
    page = (ROOT / "docs" / "program.md").read_text(encoding="utf-8")
    for option, name in SHARED.items():
        assert re.search(f"`--{option}`.*`{name}`", page), option


def test_exit_codes_are_documented():
    page = (ROOT / "docs" / "program.md").read_text(encoding="utf-8").partition("## Exit codes")[2]
    rows = re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE)
    assert [int(code) for row in rows for code in row.split(", ")] == list(EXIT_CODES)


def test_help_cuts_no_description():
    assert "..." not in call_program("--help").out.replace("[ARGS]...", "")


def test_environment_sets_options_and_the_command_line_wins(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "base")
    monkeypatch.setenv("MOEMERGE_SHOW_TENSORS", "*nothing*")
    assert call_program("show", checkpoint).code == 5
    assert call_program("show", checkpoint, "--tensors", "*").code == 0


@pytest.fixture(scope="module")
def checkpoint_with_a_warning(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("one") / "base")


def test_logs_are_hints_and_are_told_in_full_on_demand(checkpoint_with_a_warning, monkeypatch):
    def show_and_log(checkpoint, *, as_json):
        log = logging.getLogger("moemerge.checkpoint")
        log.debug("a detail")
        log.warning("something odd")

    monkeypatch.setattr("moemerge.cli.show._show_checkpoint", show_and_log)
    plain = call_program("show", checkpoint_with_a_warning)
    assert plain.err == "warning: something odd\n"
    assert call_program("show", checkpoint_with_a_warning, "--quiet").err == ""
    for arguments in (("-v", "show"), ("show", "--verbose"), ("show", "--verbose", "--quiet")):
        told = call_program(*arguments, checkpoint_with_a_warning).err
        assert re.search(
            r"^\d\d:\d\d:\d\d debug: a detail\n\d\d:\d\d:\d\d warning: something odd$", told, re.M
        )
    assert logging.getLogger("moemerge").handlers == []


def complete(line, folder):
    """What Bash would offer for the last word of a line."""
    words = line.split(" ")
    environment = {
        "_MOEMERGE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    watched = (
        "import sys\nfrom moemerge.cli import main\ntry:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'numpy', 'scipy', 'huggingface_hub', 'tokenizers'} & sys.modules.keys()\n"
        "    sys.stderr.write(' '.join(sorted(heavy)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == "", "nothing heavy is imported"
    return done.stdout.split()


def test_shell_completes_commands_options_and_variants(mini_bundle):
    folder, bundle = mini_bundle.parent, mini_bundle.name
    assert complete("moemerge sh", folder) == ["show"]
    assert complete("moemerge serve --max-q", folder) == ["--max-queue", "--max-queue-per-variant"]
    assert complete(f"moemerge run {bundle} -v s", folder) == ["scripture", "sums"]
    assert complete(f"moemerge export {bundle} --variant ", folder) == ["code", "scripture", "sums"]
    assert complete("moemerge run missing.moe -v s", folder) == []
    assert complete("moemerge run -v s", folder) == []


def test_completion_is_installed_for_the_shell(tmp_path):
    program = f"{Path(sys.executable).parent}/moemerge"
    script = f"""
        {program} --install-completion
        source ~/.bash_completions/moemerge.sh
        COMP_WORDS=({program} sim) COMP_CWORD=1
        _moemerge_completion {program}
        echo "completed: ${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "completed: similarity" in done.stdout, done.stdout + done.stderr
    assert "moemerge.sh" in (tmp_path / ".bashrc").read_text()
