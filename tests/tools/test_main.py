from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from prepared import MAIN, Prepared, prepared
from readers import PATIENCE
from stores import NASTY

from moetier.tiers.store.folder import REPLACED
from moetier.tools.main import COMMANDS, build_parser, main


def test_it_is_a_module_too() -> None:
    run = subprocess.run([sys.executable, "-m", "moetier", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"moetier {version('moetier')}\n"


HEAVY = ("torch", "transformers", "zarr", "hqq", "numpy", "matplotlib", "starlette", "uvicorn", "textual")


@pytest.fixture(scope="module")
def bare() -> Iterator[Prepared]:
    """Runs scripts in processes that have imported what an interpreter of a command has before it reads its line."""
    with prepared("moetier.tools.main", commands=()) as scripts:
        yield scripts


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda command: " ".join(command))
def test_help_imports_the_command_alone_and_nothing_heavy(bare: Prepared, command: tuple[str, ...]) -> None:
    """That is what keeps it under 0.2 s; a clock would tell of the machine as well."""
    code = (
        "import sys; from moetier.tools.main import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "commands = [name.partition('.commands.')[2] for name in sys.modules if '.commands.' in name]\n"
        f"print(commands, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = bare.run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: moetier")
    named = set(command) | {  # whose functions they take
        "demo": {"generate"},
        "pull": {"convert"},
        "plot": {"stats"},
        "top": {"stats"},
    }.get("".join(command), set())
    commands, heavy = result.stderr.strip()[1:-1].split("] [")
    assert set(re.findall(r"\w+", commands)) <= named
    assert not heavy


def test_rm_of_a_converted_model_imports_nothing_heavy_that_it_does_not_use(tmp_path: Path, tinymix_4bit: Path) -> None:
    """Not even if it finishes a replacement: numpy alone is needed, for checksums."""
    folder = Path(shutil.copytree(tinymix_4bit, tmp_path / "tiny"))
    shutil.copytree(tinymix_4bit, folder / REPLACED)
    code = (
        "import sys; from pathlib import Path; from moetier.runtime.model.name_files import register_name\n"
        f"from moetier.tools.main import main; register_name(Path({str(folder)!r}))\n"
        f"print(main(['rm', 'tiny', '--yes']), {{*{HEAVY!r}}} & {{*sys.modules}}, file=sys.stderr)"
    )
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stderr == "0 {'numpy'}\n"
    assert not folder.exists()


def test_a_users_mistake_gets_two_lines_and_no_traceback(bare: Prepared, tmp_path: Path) -> None:
    result = bare.run(MAIN, "verify", tmp_path / "nothing")
    assert result.returncode == 1
    cause, fix = result.stderr.splitlines()
    assert cause.startswith("moetier: ")
    assert str(tmp_path / "nothing") in cause
    assert fix.startswith("  ")


def test_debugging_shows_the_traceback(bare: Prepared, tmp_path: Path) -> None:
    assert "Traceback" in bare.run(MAIN, "verify", tmp_path, environment={"MOETIER_DEBUG": "1"}).stderr


def test_options_stand_on_either_side_of_the_prompt() -> None:
    for words in (
        ["generate", "DIR", "--ram", "6GiB", "the prompt"],
        ["generate", "--ram", "6GiB", "DIR", "the prompt"],
        ["generate", "DIR", "the prompt", "--ram", "6GiB"],
    ):
        arguments = build_parser().parse_args(words)
        assert (str(arguments.directory), arguments.prompt, arguments.ram) == ("DIR", "the prompt", "6GiB")


@pytest.mark.parametrize("model", [["-m", "DIR"], ["--model", "DIR"], ["--model=DIR"]])
def test_short_options_are_those_of_llama_cpp(model: list[str]) -> None:
    for words in (["generate", *model, "a prompt"], ["generate", "a prompt", "--ram", "6GiB", *model]):
        arguments = build_parser().parse_args([*words, "-n", "5", "-t", "1", "-c", "99"])
        assert (str(arguments.directory), arguments.prompt) == ("DIR", "a prompt")
        assert (arguments.max_new_tokens, arguments.threads, arguments.context) == (5, 1, 99)
    for command in ("chat", "serve"):
        arguments = build_parser().parse_args([command, *model, "-t", "1", "-c", "99"])
        models = arguments.directories if command == "serve" else [arguments.directory]
        assert ([*map(str, models)], arguments.threads, arguments.context) == (["DIR"], 1, 99)
    for words in (["--", "-m"], ["-m is an option"], ["-my word"]):
        assert build_parser().parse_args(["generate", "DIR", *words]).prompt == words[-1]


@pytest.mark.parametrize(
    ("words", "cause", "fix"),
    [
        (["genrate"], "There is no command 'genrate'", "Did you mean generate? moetier --help"),
        (["run", "x"], "There is no command 'run'", "For a conversation: moetier chat NAME. moetier --help"),
        (["frobnicate"], "There is no command 'frobnicate'", "  moetier --help"),
        (["bench", "decod"], "There is no bench 'decod'", "Did you mean decode?"),
        (
            ["bench", "./x"],
            "There is no bench './x'.",
            "datapoint, convert first (moetier bench disk ./mixtral-4bit). ",
        ),
        (["cache", "./x"], "There is no cache './x'.", "Name one of list, clear first (moetier cache list ~/pages). "),
        (["--verson"], "no option --verson", "Did you mean --version?"),
        (["convert"], "convert needs SRC, DST.", "moetier convert --help"),
        (["generate", "DIR", "--rma", "2GiB", "hello"], "generate has no option --rma.", "Did you mean --ram?"),
        (["generate", "DIR", "--prompt", "hello"], "generate has no option --prompt.", "Give PROMPT without --prompt."),
        (["generate", "DIR", "--frobnicate"], "generate has no option --frobnicate.", "  moetier generate --help"),
        (["generate", "DIR", "--ram"], "--ram needs a value.", "moetier generate --help"),
        (["verify", "--jsn"], "verify has no option --jsn.", "Did you mean --json?"),
        (["bench", "decode", "DIR", "--toens=3"], "bench decode has no option --toens.", "Did you mean --tokens?"),
        (["convert", "SRC", "DST", "--bits", "5"], "--bits can't be 5.", "Choose from 16, 8, 4, 3, 2, native."),
        (["convert", "SRC", "DST", "--bits", "few"], "--bits can't be few.", "Choose from 16, 8, 4, 3, 2, native."),
        (["generate", "DIR", "--seed", "x"], "--seed: 'x' is not a whole number.", "--help"),
        (["plan", "SRC", "--bits", "few"], "--bits: 'few' is not of the form N,...", "--help"),
        (["generate", "DIR", "to", "be"], "generate takes no further argument, but there is 'be'.", "quotes"),
        (["generate", "DIR", "-n", "x"], "-n/--max-new-tokens: 'x' is not a whole number.", "moetier generate --help"),
        (["generate", "DIR", "to", "-t", "0"], "-t/--threads: 0 is out of range.", "the CPUs of this machine"),
        (["generate", "-m"], "-m/--model needs a value.", "moetier generate --help"),
        (["generate", "-m", "DIR", "to", "be"], "generate takes no further argument, but there is 'be'.", "quotes"),
        (["chat", "DIR", "-m", "OTHER"], "chat takes no further argument, but there is 'DIR'.", "moetier chat DIR. "),
        (
            ["chat", "DIR", "some", "text"],
            "takes no further argument, but there is 'some'.",
            "echo 'TEXT' | moetier chat",
        ),
        (["serve", "DIR", "-n", "4"], "serve has no option -n.", "moetier serve --help"),
        (["generate", "DIR", "-p", "to be"], "generate has no option -p.", "Give PROMPT without -p."),
        (["generate", "DIR", "-p=hi"], "generate has no option -p.", "Give PROMPT without -p."),
        (["generate", "DIR", "-p=to be"], "generate has no option -p.", "Give PROMPT without -p."),
        (["generate", "DIR", "--n-predict", "8"], "no option --n-predict.", "Give -n/--max-new-tokens."),
        (["serve", "DIR", "--ctx-size", "8192"], "serve has no option --ctx-size.", "Give -c/--context."),
        (["serve", "DIR", "-ngl", "99"], "serve has no option -ngl.", "Give --device-memory."),
        (["generate", "DIR", "-ngl", "99"], "generate has no option -ngl.", "Give --device-memory."),
        (["chat", "DIR", "-ngl", "99"], "chat has no option -ngl.", "Give --device-memory."),
        (["convert", "SRC", "DST", "-ngl", "99"], "convert has no option -ngl.", "  moetier convert --help"),
        (["generate", "DIR", "a\udcff"], "PROMPT: The value is not UTF-8 text.", "iconv"),
        (["chat", "DIR", "--system", "a\udcff"], "--system: The value is not UTF-8 text.", "iconv"),
        (
            ["generate", "DIR", "--max-new-tokens", "x"],
            "--max-new-tokens: 'x' is not a whole number.",
            "moetier generate --help",
        ),
        (["generate", "DIR", "--max-new-tokens", "0"], "--max-new-tokens: 0 is out of range.", "Give 1 to 2^31 - 1."),
        (["generate", "DIR", "--temperature", "-1"], "--temperature: -1 is out of range.", "Give 0 to"),
        (["generate", "DIR", "--temperature", "nan"], "--temperature: nan is out of range.", "Give 0 to"),
        (["generate", "DIR", "--seed", str(1 << 64)], f"--seed: {1 << 64} is out of range.", "from 0 to 2^64 - 1"),
        (["generate", "DIR", "--ram", "much"], "--ram: 'much' is not an amount of memory.", "6GiB"),
        (["generate", "DIR", "--ram", "-2GiB"], "--ram: '-2GiB' is not an amount of memory.", "6GiB"),
        (["generate", "DIR", "--device", "tpu"], "--device: 'tpu' is not a device.", '"cpu"'),
        (["generate", "DIR", "--daemon", "a::b"], "--daemon: 'a::b' is not the address of a daemon", "HOST:PORT"),
        (["generate", "DIR", "--look-ahead", "9"], "--look-ahead: 9 is out of range.", "Give 1 to 8."),
        (["generate", "DIR", "--max-new-tokens", "9" * 400], f"{'9' * 400} is out of range.", "Give 1 to 2^31 - 1."),
        (["generate", "DIR", "--context", str(1 << 31)], f"{1 << 31} is out of range.", "Give 1 to 2^31 - 1."),
        (["chat", "DIR", "--prefill-chunk", "0"], "--prefill-chunk: 0 is out of range.", "Give 1 to 2^31 - 1."),
        (["daemon", "DIR", "--folder", "a:7070"], "--folder: 'a:7070' is not a folder.", "use --listen"),
        (["serve", "DIR", "--port", "99999"], "--port: 99999 is out of range.", "0 for any free port"),
        (["serve", "DIR", "--parallel", "0"], "--parallel: 0 is out of range.", "Give 1 to 2^31 - 1."),
        (["plan", "SRC", "--context", "0"], "--context: 0 is out of range.", "Give 1 to 2^31 - 1."),
        (["convert", "SRC", "DST", "--workers", "0"], "--workers: 0 is out of range.", "Give 1 to 2^31 - 1."),
        (
            ["convert", "SRC", "DST", "--group-size", "7"],
            "--group-size can't be 7.",
            "Choose from 16, 32, 64, 128, 256.",
        ),
        (
            ["trace", "DIR", "--prompts", "P", "-o", "T.npz", "--look-ahead", "-1"],
            "--look-ahead: -1 is out of range.",
            "with 0, no predictions",
        ),
        (["quality", "SRC", "--text", "T", "--tokens", "1"], "--tokens: 1 is out of range.", "Give 2 to"),
        (["synthetic", "DST", "--blocks", "0"], "--blocks: 0 is out of range.", "Give 1 to 2^31 - 1."),
        (["synthetic", "DST", "--seed", "-1"], "--seed: -1 is out of range.", "from 0 to 2^64 - 1"),
        (["bench", "decode", "DIR", "--tokens", "0"], "--tokens: 0 is out of range.", "Give 1 to 2^31 - 1."),
        (["bench", "decode", "DIR", "--rounds", "0"], "--rounds: 0 is out of range.", "Give 1 to 2^31 - 1."),
        (["bench", "decode", "DIR", "--limit", "much"], "--limit: 'much' is not an amount of memory.", "6GiB"),
        (["bench", "disk", "DIR", "--seconds", "-1"], "--seconds: -1 is out of range.", "Give a number greater than 0"),
        (
            ["bench", "disk", "DIR", "--seconds", "inf"],
            "--seconds: inf is out of range.",
            "Give a number greater than 0",
        ),
        (["bench", "kernels", "--rows", "0"], "--rows: 0 is out of range.", "Give 1 to 2^31 - 1."),
        (["bench", "convert", "SRC", "--bits", "16"], "--bits can't be 16.", "Choose from 8, 4, 3, 2."),
        (["bench", "convert", "SRC", "--workers", "0"], "--workers: 0 is out of range.", "Give 1 to 2^31 - 1."),
        (["plot", "heatmap", "T", "-o", "a.png", "--cached", "-1"], "--cached: -1 is out of range.", "Give 0 to"),
        (
            ["plot", "figure1", "T", "-o", "a.png", "--tokens", "9-8"],
            "The range of tokens 9-8 is empty.",
            "the first and",
        ),
        (["config", "show", "nope"], "COMMAND: 'nope' is not a command with settings.", "pull, convert"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_two_lines_too(
    words: list[str], cause: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert [line[:9].rstrip() for line in said] == ["moetier:", said[1][:9].rstrip()]
    assert said[1].startswith("  ")
    assert cause in said[0]
    assert fix in said[1]


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["plan", "SRC", "--disk", "0"], "--disk can't be 0.0."),
        (["plan", "SRC", "--bits", "9"], "--bits can't be 9."),
        (["plan", "SRC", "--trunk-bits", "16,3"], "--trunk-bits can't be 3."),
        (["bench", "kernels", "./DIR", "--bits", "4"], "whose records have their own bits"),
        (["plot", "hits", "T", "-o", "a.jpg"], "a.jpg is not a .png or .svg file."),
        (["plot", "resident", "a:b:c", "-o", "a.png"], "'a:b:c' is not the address of a daemon"),
        (["stats", "a:b:c"], "'a:b:c' is not the address of a daemon"),
        (["replay", "T", "--record", "50%"], "--record can't be '50%'."),
        (["replay", "T", "--disk", "1"], "--disk and --link have no effect without the size of an expert."),
        (["daemon", "./DIR", "--listen", "a:b"], "'a:b' is not HOST:PORT."),
        (["daemon", "./DIR", "--insecure"], "are for TCP"),
        (["generate", "./DIR", "x", "--daemon", "none", "--insecure"], "only for a daemon on another host"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_so_is_one_that_is_wrong_as_a_whole(words: list[str], cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the model: none of these is there."""
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert cause in said[0]


def test_what_is_no_option_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """A clear beginning of one, a text, and what stands behind --."""
    for words, prompt in (
        (["DIR", "--max-new", "3", "x"], "x"),
        (["DIR", "--a text that begins so"], "--a text that begins so"),
        (["DIR", "--", "--rma"], "--rma"),
    ):
        assert build_parser().parse_args(["generate", *words]).prompt == prompt


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = f"'{sys.executable}' -m moetier.tools.main completion bash | head -n 0"
    result = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "SRC", "DST"], {"stdout", "stderr"}),
        (["verify", "DST"], {"stderr"}),
        (["config", "show"], {"stdout"}),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_nobody_reads(scripts: Prepared, tmp_path: Path, stream: str, words: list[str], said: set[str]) -> None:
    """What it does, or its error, is said where the reader has gone away: one exit code for both, and no traceback."""
    places = {"SRC": str(save_checkpoint(tmp_path / "src")), "DST": str(tmp_path / "dst")}
    reader, writer = os.pipe()
    os.close(reader)
    with Path(os.devnull).open() as nothing, (tmp_path / "other").open("w") as other:
        streams = {name: writer if name == stream else other.fileno() for name in ("stdout", "stderr")}
        words = [places.get(word, word) for word in words]
        process = scripts.start(MAIN, *words, stdin=nothing.fileno(), **streams)
        os.close(writer)
        status = process.wait(PATIENCE)
    assert (status == 128 + signal.SIGPIPE) == (stream in said)
    assert "Traceback" not in (tmp_path / "other").read_text()


@pytest.mark.parametrize(("level", "head"), [("", ""), ("info", "WARNING x: ")])
def test_what_is_logged_is_a_line_of_what_can_be_read(bare: Prepared, level: str, head: str) -> None:
    """By a daemon's own words, among others."""
    code = (
        "import logging; from moetier.tools.main import main; main(['completion', 'bash'])\n"
        f"logging.getLogger('x').warning('%s', {NASTY!r})\n"
        f"try: raise OSError({NASTY!r})\n"
        "except OSError: logging.getLogger('x').exception('no')"
    )
    done = bare.run(code, environment={"MOETIER_LOG": level})
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == f"{head}x?[31m?]0;owned??y"
    assert all(line.isprintable() for line in lines)
    assert lines[2] == "Traceback (most recent call last):"


ALL_CLOSED = "<&- >&- 2>&-"
CODES = {"list": 0, "config show": 0, "verify /nonexistent": 1, "rm nobody/nothing": 1, "no-command": 2}
QUICK = {  # what writes to the stream that is closed, and what writes to each if all are; none with "<&-" alone
    (">&-", "config show"),
    ("2>&-", "verify /nonexistent"),
    *((ALL_CLOSED, words) for words in ("config show", "verify /nonexistent", "no-command")),
}


@pytest.mark.parametrize(
    ("streams", "words"),
    [
        pytest.param(streams, words, marks=[] if (streams, words) in QUICK else [pytest.mark.slow])
        for streams in ("<&-", ">&-", "2>&-", ALL_CLOSED)
        for words in CODES
    ],
)
def test_streams_that_are_closed_say_nothing(tmp_path: Path, streams: str, words: str) -> None:
    script = f"'{sys.executable}' -m moetier.tools.main {words} {streams}"
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path)}
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (CODES[words], False)


def test_no_process_reads_the_only_open_stream() -> None:
    script = f"'{sys.executable}' -m moetier.tools.main verify /nonexistent >&-"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(["/bin/sh", "-c", script], stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("words", [["generate", "", "To be"], ["convert", "SRC", ""], ["plan", ""], ["daemon", ""]])
def test_an_empty_path_is_not_the_current_folder(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "The path is empty." in capsys.readouterr().err


CUT = """
import mmap, os, sys
from moetier.tools.main import main
assert main(["completion", "bash"]) == 0
with open(sys.argv[1], "r+b") as stream:
    mapped = mmap.mmap(stream.fileno(), 1 << 16, access=mmap.ACCESS_READ)
    stream.truncate(0)
    print(mapped[1 << 15])
"""


def test_a_fault_in_a_mapped_file_that_is_cut_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "trunk"
    path.write_bytes(bytes(1 << 16))
    ended = subprocess.run([sys.executable, "-c", CUT, path], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in ended.stderr
    assert 'File "<string>", line 8 in <module>' in ended.stderr


@pytest.mark.slow
def test_ctrl_c_again_and_again_prints_no_traceback(tinymix_4bit: Path) -> None:
    """The second comes when the command has ended, and Python ends."""
    words = ["generate", str(tinymix_4bit), "la mattina", "--max-new-tokens", "1500", "--daemon", "none"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moetier.tools.main", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        said = process.stderr.readline()
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.001)
        said += process.stderr.read()
    assert said == "moetier: interrupted\n"
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
