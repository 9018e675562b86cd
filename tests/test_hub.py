"""Checkpoints on the Hub: the real client against a small server on loopback that speaks the Hub's API."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from saebench.errors import UserError
from saebench.hub import Downloaded, Reference, download
from saebench.loaders._files import Limits, Source

REPO = "someone/saes"
ONE, TWO = "1" * 40, "2" * 40
LARGE = bytes(range(256)) * 400
Files = dict[str, bytes]


class Hub:
    """What the server knows, what it does wrong, and what it was asked for."""

    def __init__(self) -> None:
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.status: dict[str, tuple[int, str]] = {}
        """By path: a status and an error code to answer with."""
        self.content: Files = {}
        """By name: what is sent in place of the listed bytes."""
        self.stops = 0
        """How often it stops in the middle of the large file."""
        self.listing: Any = None
        """What is sent in place of the listing."""
        self.asked: list[str] = []
        self.url = ""

    def listed(self, commit: str) -> Any:
        siblings = [_sibling(name, content) for name, content in self.commits[commit].items()]
        return {"id": REPO, "sha": commit, "siblings": siblings, "private": False}


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_name(content)}
    if name.endswith((".safetensors", ".npz", ".pt")):
        sha = hashlib.sha256(content).hexdigest()
        found |= {
            "blobId": "0" * 40,
            "lfs": {"size": len(content), "sha256": sha, "pointerSize": 1},
        }
    return found


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        for part, (status, code) in self.hub.status.items():
            if part in path:
                return self.send(b"{}", body, status, {"X-Error-Code": code} if code else {})
        if listing := re.fullmatch(rf"/api/models/{REPO}/revision/(.+)", path):
            return self.listing(listing[1], body)
        if file := re.fullmatch(rf"/{REPO}/resolve/([0-9a-f]+)/(.+)", path):
            return self.file(file[1], file[2], body)
        return self.send(b"{}", body, 404, {"X-Error-Code": "RepoNotFound"})

    def listing(self, revision: str, body: bool) -> None:
        commit = self.hub.branches.get(revision, revision)
        if self.hub.listing is None and commit not in self.hub.commits:
            return self.send(b"{}", body, 404, {"X-Error-Code": "RevisionNotFound"})
        told = self.hub.listing if self.hub.listing is not None else self.hub.listed(commit)
        return self.send(json.dumps(told).encode(), body, 200, {})

    def file(self, commit: str, name: str, body: bool) -> None:
        files = self.hub.commits[commit]
        if name not in files:
            return self.send(b"", body, 404, {"X-Error-Code": "EntryNotFound"})
        content = self.hub.content.get(name, files[name])
        about = {"ETag": f'"{git_name(content)}"', "X-Repo-Commit": commit}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        return self.send(
            content[int(start[1]) if start else 0 :], body, 206 if start else 200, about
        )

    def send(self, content: bytes, body: bool, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        if body:
            stops = self.hub.stops > 0 and len(content) == len(LARGE)
            self.hub.stops -= stops
            self.wfile.write(content[: len(LARGE) // 2] if stops else content)
        self.close_connection = True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with two commits of one repository, main being the first, that the client takes for the Hub."""
    known = Hub()
    known.commits[ONE] = {
        "README.md": b"# SAEs",
        ".gitattributes": b"*.safetensors",
        "a/cfg.json": b"{}",
        "a/sae.safetensors": LARGE,
        "b/ae.pt": b"pickled",
        "b/config.json": b"{}",
        "one.npz": b"numbers",
    }
    known.commits[TWO] = {"a/cfg.json": b"[]", "a/sae.safetensors": LARGE[::-1]}
    known.branches["main"] = ONE
    handler = type("Bound", (Handler,), {"hub": known})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    known.url = f"http://127.0.0.1:{server.server_port}"
    pretend(monkeypatch, known.url)
    yield known
    server.shutdown()
    thread.join()
    server.server_close()


def pretend(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The client takes that for the Hub, and does not wait before it tries again."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    hurried = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time", hurried)
    monkeypatch.setattr("huggingface_hub.utils._http.time", hurried)
    huggingface_hub.close_session()


def fetch(cache: Path, revision: str = "main", folder: str = "a", **limits: Any) -> Downloaded:
    return download(Reference(REPO, revision, folder), Limits(**limits), cache)


def refusal(cache: Path, revision: str = "main", folder: str = "a", **limits: Any) -> str:
    with pytest.raises(UserError) as refused:
        fetch(cache, revision, folder, **limits)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def files_below(folder: Path) -> dict[str, bytes]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert not any(path.is_symlink() for path in found)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_folder_is_downloaded_as_plain_files_at_the_commit_of_a_branch(hub: Hub, tmp_path: Path):
    found = fetch(tmp_path)
    assert found == (tmp_path / "hub" / "someone--saes" / ONE / "a", ONE)
    assert files_below(found.path) == {"cfg.json": b"{}", "sae.safetensors": LARGE}
    assert Source(found.path, Limits()).names == ["cfg.json", "sae.safetensors"]
    kept = files_below(tmp_path / "hub")
    assert {name for name in kept if not name.endswith(f"{ONE}.json")} == {
        f"someone--saes/{ONE}/a/cfg.json",
        f"someone--saes/{ONE}/a/sae.safetensors",
    }


def test_one_file_is_downloaded_alone(hub: Hub, tmp_path: Path):
    found = fetch(tmp_path, ONE, "one.npz")
    assert found.path.read_bytes() == b"numbers"
    assert Source(found.path, Limits()).names == ["one.npz"]
    assert len(list(found.path.parent.iterdir())) == 1


def test_of_a_whole_repository_only_what_a_format_reads_is_downloaded(hub: Hub, tmp_path: Path):
    found = fetch(tmp_path, folder="")
    assert sorted(files_below(found.path)) == [
        "a/cfg.json",
        "a/sae.safetensors",
        "b/config.json",
        "one.npz",
    ]


def test_pickles_are_downloaded_where_they_are_allowed_and_named_where_not(
    hub: Hub, tmp_path: Path
):
    assert "--allow-pickle-weights" in refusal(tmp_path, folder="b")
    assert not any("resolve" in path for path in hub.asked)
    found = fetch(tmp_path, folder="b", allow_pickle=True)
    assert files_below(found.path) == {"ae.pt": b"pickled", "config.json": b"{}"}


def test_what_is_too_large_is_refused_before_anything_is_downloaded(hub: Hub, tmp_path: Path):
    said = refusal(tmp_path, max_bytes=len(LARGE) + 1)
    assert "--max-size allows 0.00" in said and "Nothing was downloaded" in said
    assert not any("resolve" in path for path in hub.asked)
    assert list(tmp_path.iterdir()) == []
    assert fetch(tmp_path, max_bytes=len(LARGE) + 2).commit == ONE


def test_a_second_look_at_a_commit_asks_nobody(hub: Hub, tmp_path: Path):
    first = fetch(tmp_path, ONE)
    asked = len(hub.asked)
    assert fetch(tmp_path, ONE) == first
    assert len(hub.asked) == asked


def test_a_second_look_at_a_branch_downloads_nothing_again(hub: Hub, tmp_path: Path):
    fetch(tmp_path)
    hub.asked.clear()
    fetch(tmp_path)
    assert hub.asked == [f"/api/models/{REPO}/revision/main"]


def test_a_branch_that_moved_gives_the_new_commit_and_the_old_one_stays(hub: Hub, tmp_path: Path):
    old = fetch(tmp_path)
    hub.branches["main"] = TWO
    new = fetch(tmp_path)
    assert new.commit == TWO
    assert files_below(new.path) == {"cfg.json": b"[]", "sae.safetensors": LARGE[::-1]}
    assert files_below(old.path) == {"cfg.json": b"{}", "sae.safetensors": LARGE}


def test_without_a_network_a_commit_that_is_there_is_found_and_another_is_not(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = fetch(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(tmp_path, ONE) == first
    assert "HF_HUB_OFFLINE" in refusal(tmp_path, TWO)
    assert "HF_HUB_OFFLINE" in refusal(tmp_path, "main")
    assert "HF_HUB_OFFLINE" in refusal(tmp_path, ONE, "one.npz")


def test_a_file_that_is_damaged_in_the_cache_is_downloaded_again(hub: Hub, tmp_path: Path):
    found = fetch(tmp_path, ONE)
    (found.path / "sae.safetensors").write_bytes(LARGE[:-1])
    assert files_below(fetch(tmp_path, ONE).path)["sae.safetensors"] == LARGE
    (tmp_path / "hub" / "someone--saes" / f"{ONE}.json").write_text("{")
    assert fetch(tmp_path, ONE) == found


def nothing_is_taken_for_whole(cache: Path) -> None:
    assert not list(cache.rglob("*.safetensors"))
    assert not list(cache.rglob(".part-*"))


@pytest.mark.parametrize("sent", [LARGE[:-1], LARGE + b"x", LARGE[::-1], b""])
def test_a_file_of_other_bytes_than_are_listed_is_refused(hub: Hub, tmp_path: Path, sent: bytes):
    hub.content["a/sae.safetensors"] = sent
    said = refusal(tmp_path)
    assert "a/sae.safetensors" in said and "run it again" in said
    nothing_is_taken_for_whole(tmp_path)
    hub.content.clear()
    assert files_below(fetch(tmp_path).path)["sae.safetensors"] == LARGE


def test_a_small_file_of_another_content_is_refused(hub: Hub, tmp_path: Path):
    hub.content["a/cfg.json"] = b"[]"
    assert "another content" in refusal(tmp_path)


def test_a_server_that_stops_half_way_every_time_is_given_up(hub: Hub, tmp_path: Path):
    hub.stops = 100
    assert "did not answer, or not to the end (RemoteProtocolError" in refusal(tmp_path)
    nothing_is_taken_for_whole(tmp_path)
    hub.stops = 0
    assert files_below(fetch(tmp_path).path)["sae.safetensors"] == LARGE


def test_a_server_that_stops_once_is_asked_again(hub: Hub, tmp_path: Path):
    hub.stops = 1
    assert files_below(fetch(tmp_path).path)["sae.safetensors"] == LARGE


@pytest.mark.parametrize(
    ("path", "status", "code", "expected"),
    [
        ("/api/", 404, "RepoNotFound", "has no repository someone/saes, or it is private"),
        ("/api/", 401, "", "has no repository someone/saes, or it is private"),
        ("/api/", 403, "GatedRepo", "is gated"),
        ("/api/", 403, "", "is gated, or you may not read it"),
        ("/api/", 404, "RevisionNotFound", "has no revision 'main'"),
        ("/api/", 500, "", "answered with 500"),
        ("/api/", 429, "", "answered with 429"),
        ("/resolve/", 403, "GatedRepo", "is gated"),
        ("/resolve/", 401, "", "has no repository someone/saes, or it is private"),
        ("/resolve/", 404, "EntryNotFound", "lists a file of someone/saes"),
        ("/resolve/", 503, "", "answered with 503"),
    ],
)
def test_a_refusal_of_the_server_is_one_message_and_nothing_is_kept(
    hub: Hub, tmp_path: Path, path: str, status: int, code: str, expected: str
):
    hub.status[path] = (status, code)
    assert expected in refusal(tmp_path)
    nothing_is_taken_for_whole(tmp_path)


def test_a_folder_that_is_not_there_is_told_what_is(hub: Hub, tmp_path: Path):
    said = refusal(tmp_path, folder="c")
    assert "someone/saes/c at 111111111111" in said and "a/cfg.json" in said


def test_a_folder_without_weights_is_refused(hub: Hub, tmp_path: Path):
    assert "has no weights" in refusal(tmp_path, folder="a/cfg.json")


@pytest.mark.parametrize(
    "name", ["../x.json", "/x.json", "a/../../x.json", "a\\x.json", "a/\x1b.json"]
)
def test_a_listed_name_that_leads_out_of_the_folder_is_refused(hub: Hub, tmp_path: Path, name: str):
    hub.commits[ONE][name] = b"{}"
    assert "leads out of" in refusal(tmp_path, folder="")
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "listing",
    [
        [],
        {},
        {"id": REPO},
        {"id": REPO, "sha": "main", "siblings": []},
        {"id": REPO, "sha": ONE, "siblings": [{"rfilename": "a/x.npz"}]},
        {
            "id": REPO,
            "sha": ONE,
            "siblings": [{"rfilename": "a/x.npz", "size": -1, "blobId": "0" * 40}],
        },
        {
            "id": REPO,
            "sha": ONE,
            "siblings": [{"rfilename": "a/x.npz", "size": 9, "blobId": "../x"}],
        },
        {"id": REPO, "sha": ONE, "siblings": [{"size": 9}]},
    ],
)
def test_an_answer_that_is_no_listing_is_refused(hub: Hub, tmp_path: Path, listing: Any):
    hub.listing = listing
    assert "no answer of a Hub" in refusal(tmp_path)


def test_a_server_with_another_commit_than_was_asked_for_is_refused(hub: Hub, tmp_path: Path):
    hub.listing = hub.listed(TWO)
    assert "it gives commit 2222" in refusal(tmp_path, ONE)


@pytest.mark.parametrize("repo", ["../x", "a--b/c", "a/b/c", ".x/y"])
def test_a_name_that_no_repository_can_have_is_refused_without_asking(
    hub: Hub, tmp_path: Path, repo: str
):
    with pytest.raises(UserError):
        download(Reference(repo, "main", ""), Limits(), tmp_path)
    assert hub.asked == []


def test_a_server_that_is_not_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        pretend(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert "did not answer, or not to the end (ConnectError" in refusal(tmp_path)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        pretend(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("saebench.hub._SECONDS", 0.1)
        assert "did not answer, or not to the end (ReadTimeout" in refusal(tmp_path)


def test_a_disk_without_room_is_said_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "have to be downloaded, and the disk of" in refusal(tmp_path)
    assert not any("resolve" in path for path in hub.asked)


def test_progress_is_told_on_the_error_stream(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    fetch(tmp_path)
    said = capfd.readouterr().err
    assert f"someone/saes@main is commit {ONE}" in said
    assert f"downloading someone/saes: {len(LARGE) + 2:,} of {len(LARGE) + 2:,} bytes" in said


@pytest.mark.slow
def test_the_endpoint_of_the_environment_is_asked(hub: Hub, tmp_path: Path):
    code = (
        "from pathlib import Path; from saebench.hub import *; from saebench.loaders._files import Limits;"
        f"print(download(Reference({REPO!r}, 'main', 'a'), Limits(), Path({str(tmp_path)!r})).commit)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, f"{ONE}\n"), ended.stderr
