"""What a process of `saebench submit --isolate` cannot do, and what becomes of one that needs too much."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from saebench import isolation, submission
from saebench.isolation import Bounds, Killed
from tests.conftest import Ended, Finished, Place, Run
from tests.test_submit import changed, trained

GIB = 1024**3
SOCKETS = """\
import socket
from saebench import isolation
isolation.enter(BOUNDS)
for attempt in (
    lambda: socket.create_connection(("127.0.0.1", PORT), timeout=5),
    lambda: socket.getaddrinfo("localhost", 80),
    lambda: socket.socket().bind(("127.0.0.1", 0)),
    lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)),
):
    try:
        attempt()
    except PermissionError as error:
        print("refused", error.errno)
    else:
        print("went through")
"""
NAMESPACE = """\
from pathlib import Path
from saebench import isolation
print(isolation.own_network(), len(Path("/proc/net/dev").read_text().splitlines()) - 2)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
        check=False,
    )


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Another thing to do in the process, after it has entered."""
    start = "import sys; from saebench import isolation; isolation.enter(sys.argv.pop(1)); "
    monkeypatch.setattr(isolation, "_CHILD", start + code)


def test_python_opens_no_socket_in_it():
    ended = python(SOCKETS.replace("BOUNDS", repr(json.dumps([4 * GIB, 60]))).replace("PORT", "1"))
    assert ended.stdout.split("\n")[:-1] == ["refused 1"] * 4, ended.stderr
    assert ended.stderr.startswith("isolated: 4 GiB of memory, 1 minutes, no network")


def test_its_network_namespace_has_no_interface_but_its_own_loopback_where_there_is_one():
    ended = python(NAMESPACE)
    there, interfaces = ended.stdout.split()
    if there == "False":
        pytest.skip("this kernel gives no network namespace")
    assert int(interfaces) == 1


def test_its_environment_has_no_variable_that_could_be_a_secret():
    given = {"PATH": "/bin", "HF_TOKEN": "hf_x", "OPENAI_API_KEY": "x", "AWS_SECRET": "x"}
    found = isolation.clean_environment(given | {"HTTPS_PROXY": "http://u:p@h", "HF_HOME": "/hf"})
    assert (found["PATH"], found["HF_HOME"], found["HF_HUB_OFFLINE"]) == ("/bin", "/hf", "1")
    assert not {"HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET", "HTTPS_PROXY"} & found.keys()
    assert found["HF_TOKEN_PATH"] == os.devnull


def test_exit_codes_are_passed_on(monkeypatch: pytest.MonkeyPatch):
    for code in (0, 1, 2):
        child(monkeypatch, f"sys.exit({code})")
        assert isolation.run([], Bounds(4 * GIB, 60)) == code


def test_what_takes_too_long_is_ended_with_one_message(monkeypatch: pytest.MonkeyPatch):
    child(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(Killed, match="stopped after 0.02 minutes"):
        isolation.run([], Bounds(4 * GIB, 1.2))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import os; os._exit(127)", "the code 127"),
    ],
)
def test_what_is_killed_is_one_message(monkeypatch: pytest.MonkeyPatch, code: str, said: str):
    child(monkeypatch, code)
    with pytest.raises(Killed, match=f"{said}, most likely for want of memory"):
        isolation.run([], Bounds(4 * GIB, 60))


def test_memory_beyond_the_bound_is_one_message_and_code_two(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    child(monkeypatch, "sys.exit(isolation.guarded(lambda: len(bytearray(2 * 1024**3))))")
    assert isolation.run([], Bounds(GIB, 60)) == 2
    err = capfd.readouterr().err
    assert "out of memory: this process may use 1 GiB" in err and "Traceback" not in err


def test_errors_of_other_kinds_stay_what_they_are(monkeypatch: pytest.MonkeyPatch):
    assert not isolation.ran_out(MemoryError())  # nothing is bounded here
    child(monkeypatch, "isolation.guarded(lambda: int('x'))")
    assert isolation.run([], Bounds(GIB, 60)) == 1


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".a.json.7.partial").write_text("{")
    (tmp_path / "runs" / "b.json").write_text("{}")
    submission.tidy(tmp_path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b.json"]
    submission.tidy(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# The command


class Home:
    def __init__(self, place: Place, suite: Path, saebench: Run) -> None:
        self.place, self.suite, self._saebench = place, suite, saebench

    def submit(self, checkpoint: Path, *options: str) -> Ended:
        folders = ("results", "checkpoints", "cache")
        places = [part for f in folders for part in (f"--{f}", str(self.place.folder / f))]
        given = [checkpoint, "--suite", self.suite, "--name", "mine", "--format", "native"]
        return self._saebench("submit", *given, "--device", "cpu", *places, *options)


@pytest.fixture
def home(finished: Finished, place: Place, saebench: Run) -> Home:
    shutil.copytree(finished.place.folder / "cache", place.folder / "cache")
    return Home(place, finished.plain, saebench)


@pytest.fixture
def mine(finished: Finished, tmp_path: Path) -> Path:
    return changed(trained(finished, "topk"), tmp_path / "given" / "mine")


@pytest.mark.slow
def test_an_isolated_submission_has_the_scores_of_one_that_is_not(home: Home, mine: Path):
    ended = home.submit(mine, "--isolate")
    assert ended.code == 0, ended.err
    assert ended.err.startswith("isolated: 8 GiB of memory, 60 minutes, no network")
    assert "mine: 5 runs scored" in ended.out
    isolated = home.place.scores()
    shutil.rmtree(home.place.folder / "results")
    assert home.submit(mine).code == 0
    assert home.place.scores() == isolated


@pytest.mark.parametrize("option", ["--isolate-memory=0.7", "--isolate-minutes=0.005"])
def test_a_submission_that_needs_more_than_it_may_leaves_nothing(
    home: Home, mine: Path, option: str
):
    ended = home.submit(mine, "--isolate", option)
    assert ended.code == 2
    assert "--isolate-m" in ended.err and "Traceback" not in ended.err
    assert home.place.files("results") == {}


@pytest.mark.parametrize("option", ["--isolate-memory=0", "--isolate-minutes=nan"])
def test_bounds_that_are_none_are_refused(home: Home, mine: Path, option: str):
    ended = home.submit(mine, "--isolate", option)
    assert ended.code == 2 and "expected a positive number" in ended.err
