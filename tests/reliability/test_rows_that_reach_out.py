"""Rows are data of others: what they name outside their own folder is not read or fetched, unless a run says so."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ftcore import hooks as h
from ftcore import pipeline
from ftcore.composition import compose, typed
from ftcore.config import DataConfig
from ftcore.errors import Refused
from ftcore.media import Reach, reaching

TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}]
SEES = ("+model=qwen2_5_vl", "model.tiny=true", "+trainer=sft")

REACHING = (
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "HTTP://169.254.169.254/latest/",
    "https://metadata.google.internal/computeMetadata/v1/",
    "http://[::ffff:169.254.169.254]/latest/",
    "http://2852039166/latest/",
    "http://localhost:{port}/secret.png",
    "http://good.example@127.0.0.1:{port}/secret.png",
    "ftp://127.0.0.1:{port}/secret.png",
    "file:///etc/passwd",
    "file://localhost{outside}/secret.png",
    "s3://bucket/secret.png",
    "hf://datasets/owner/name/secret.png",
    "zip://secret.png::http://127.0.0.1:{port}/a.zip",
    "/etc/passwd",
    "/proc/self/environ",
    "{outside}/secret.png",
    "../outside/secret.png",
    "media/../../outside/secret.png",
    "link.png",
    "folder_link/secret.png",
    "~/secret.png",
    "~root/secret.png",
    "a\0b.png",
    "x" * 5000,
)
"""At least 20 rows; `link.png` and `folder_link` are symlinks that leave the folder of the rows."""

WATCHED = """
    import json, os, sys

    reads, sockets, names = [], [], json.loads(sys.argv[1])

    def watch(event, details):
        if event == "open" and isinstance(details[0], (str, bytes)):
            real = os.path.realpath(os.fsdecode(details[0]))
            if real in names:
                reads.append(real)
        elif event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
            sockets.append(repr(details))

    from ftcore import cli
    sys.addaudithook(watch)
    code = cli.run(json.loads(sys.argv[2]))
    print(json.dumps({"code": code, "reads": reads, "sockets": sockets}), file=sys.__stdout__)
"""


def png() -> bytes:
    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.new("RGB", (56, 56), (255, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def places(in_tmp: Path) -> Path:
    """Rows in `rows/`, and a picture outside that nothing may read."""
    (in_tmp / "rows/media").mkdir(parents=True)
    (in_tmp / "outside").mkdir()
    (in_tmp / "outside/secret.png").write_bytes(png())
    (in_tmp / "rows/media/red.png").write_bytes(png())
    (in_tmp / "rows/link.png").symlink_to(in_tmp / "outside/secret.png")
    (in_tmp / "rows/folder_link").symlink_to(in_tmp / "outside")
    (in_tmp / "rows/inner.png").symlink_to(in_tmp / "rows/media/red.png")
    return in_tmp


@contextmanager
def server(folder: Path, onward: str = "") -> Iterator[tuple[int, list[str]]]:
    """A host on this machine that counts what it is asked for; `/moved` sends on to `onward`."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            moved = self.path == "/moved"
            self.send_response(302 if moved else 200)
            if moved:
                self.send_header("Location", onward)
            self.end_headers()
            self.wfile.write(b"" if moved else png())

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        thread = threading.Thread(target=host.serve_forever)
        thread.start()
        try:
            yield host.server_address[1], asked
        finally:
            host.shutdown()
            thread.join()


def write(rows: list[dict[str, Any]], name: str = "rows/x.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def seen(*overrides: str) -> Any:
    """The rows as a trainer gets them."""
    hooks, plan = pipeline.prepare(typed(compose([*SEES, *overrides])))
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    raw = hooks.first(h.ftcore_load_dataset, plan=plan)
    return list(hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer)["train"])


def told(port: int, outside: Path) -> list[str]:
    return [text.replace("{port}", str(port)).replace("{outside}", str(outside)) for text in REACHING]


@pytest.mark.parametrize("form", ["text", "path", "list"])
def test_each_row_is_refused(form: str, places: Path) -> None:
    rows = told(1, places / "outside")
    assert len(rows) >= 20
    for text in rows:
        value: Any = {"text": text, "path": {"path": text, "bytes": None}, "list": ["media/red.png", text]}[form]
        reason = reaching({"image": value}, ("image",), Reach(), places / "rows")
        there = os.path.exists(os.path.join("rows", text)) if "\0" not in text and len(text) < 5000 else False
        outside = reason is not None and ("outside" in reason or "not fetched" in reason or "no path" in reason)
        assert outside or (text.startswith("~") and reason is None and not there), text
    assert reaching({"image": "media/red.png"}, ("image",), Reach(), places / "rows") is None
    assert reaching({"image": "inner.png"}, ("image",), Reach(), places / "rows") is None
    assert reaching({"image": str(places / "rows/media/red.png")}, ("image",), Reach(), places / "rows") is None


@pytest.mark.parametrize("kind", ["images", "audio"])
def test_nothing_is_read_and_no_socket_opened(kind: str, places: Path) -> None:
    """The whole command line, under an audit hook: every row is counted as bad."""
    with server(places) as (port, asked):
        rows = told(port, places / "outside")
        if kind == "images":
            path = write([{"image": text, "messages": TALK} for text in rows])
            model = [*SEES]
        else:
            path = write([{"audio": text, "text": "Red."} for text in rows])
            model = ["+model=whisper", "model.tiny=true", "+trainer=speech"]
        names = ["/etc/passwd", os.path.realpath("/proc/self/environ"), str(places / "outside/secret.png")]
        names += [os.path.expanduser("~/secret.png"), "/root/secret.png"]
        words = [json.dumps(names), json.dumps(["train", *model, f"data.path={path}", f"data={kind}"])]
        script = ["-c", textwrap.dedent(WATCHED), *words]
        done = subprocess.run([sys.executable, *script], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"code": 65, "reads": [], "sockets": []}
    assert asked == []
    assert f"{len(rows)} problems" in done.stderr, "every row is one"


def test_rows_past_those_that_are_looked_at_reach_no_further(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftcore.defaults.check_data.STREAMED", 3)
    good = {"image": "media/red.png", "messages": TALK}
    rows = [good] * 3 + [{"image": str(places / "outside/secret.png"), "messages": TALK}]
    stream = ("data.streaming=true", "trainer.max_steps=1")
    with pytest.raises(Refused, match=r"x\.jsonl:4: column 'image' names .*secret\.png, which lies outside"):
        seen(f"data.path={write(rows)}", *stream)


def test_parquet_is_held_to_the_same_and_nothing_is_decoded(places: Path) -> None:
    """`datasets` would open, or fetch, what the path of an image column says."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image, List, Value

    kinds = Features({"image": Image(), "messages": List({"role": Value("string"), "content": Value("string")})})

    def table(*images: dict[str, Any]) -> str:
        made = Dataset.from_dict({"image": list(images), "messages": [TALK] * len(images)}, features=kinds)
        pq.write_table(made.data.table, "rows/x.parquet")
        assert isinstance(pq.read_table("rows/x.parquet"), pa.Table)
        return "data.path=rows/x.parquet"

    good = [{"path": "media/red.png", "bytes": None}, {"path": None, "bytes": png()}]
    assert len(seen(table(*good))) == 2, "beside the file, wherever the run stands"
    with server(places) as (port, asked):
        for text in (f"http://127.0.0.1:{port}/a.png", "../outside/secret.png"):
            with pytest.raises(Refused, match=r"x\.parquet: row 3: column 'image'"):
                seen(table(*good, {"path": text, "bytes": None}))
        assert asked == []


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_rows_of_the_hub_reach_no_file_of_this_machine(
    streaming: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past those that are looked at beforehand as well; their bytes are taken."""
    from datasets import Dataset, Features, Image, List, Value

    monkeypatch.setattr("ftcore.defaults.check_data.FROM_HUB", 1)
    kinds = Features({"image": Image(), "messages": List({"role": Value("string"), "content": Value("string")})})
    images: list[dict[str, Any]] = [{"path": "a.png", "bytes": png()}] * 21

    def load_dataset(path: str, subset: Any, split: str, streaming: bool) -> Any:
        made = Dataset.from_dict({"image": images, "messages": [TALK] * len(images)}, features=kinds)
        return made.to_iterable_dataset() if streaming else made

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    words = ["data.path=owner/name", f"data.streaming={streaming}", "trainer.max_steps=1"]
    assert len(seen(*words)) == 21
    with server(places) as (port, asked):
        for text in (str(places / "outside/secret.png"), f"http://127.0.0.1:{port}/a.png"):
            images[20] = {"path": text, "bytes": None}
            with pytest.raises(Refused, match="row 21 of the train split: column 'image'"):
                seen(*words)
        assert asked == []


def test_files_of_a_data_set_of_the_hub_are_read_from_where_they_were_fetched_to(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set that is a folder of images names them by their paths in the cache; another one's stay out of reach."""
    from datasets import Dataset, Features, Image, List, Value

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(places / "hub"))
    kinds = Features({"image": Image(), "messages": List({"role": Value("string"), "content": Value("string")})})
    images = []
    for name in ("datasets--owner--name", "models--owner--name"):
        file = places / "hub" / name / "a.png"
        file.parent.mkdir(parents=True)
        file.write_bytes(png())
        images.append({"path": str(file), "bytes": None})

    def load_dataset(path: str, subset: Any, split: str, streaming: bool) -> Any:
        made = Dataset.from_dict({"image": images, "messages": [TALK] * len(images)}, features=kinds)
        return made.to_iterable_dataset() if streaming else made

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(Refused, match="row 2 of the train split: column 'image'"):
        seen("data.path=owner/name")
    images.pop()
    assert len(seen("data.path=owner/name")) == 1


def test_what_a_run_allows_is_read(places: Path) -> None:
    rows = [{"image": text, "messages": TALK} for text in ("../outside/secret.png", "link.png", "media/red.png")]
    allowed = f"data.allow_roots=[{places / 'outside'}]"
    assert len(seen(f"data.path={write(rows)}", allowed)) == 3
    with pytest.raises(Refused, match=r"'data\.allow_roots=\[.*outside\]'"):
        seen("data.path=rows/x.jsonl")
    with pytest.raises(Refused, match="there is no folder nowhere"):
        seen("data.path=rows/x.jsonl", "data.allow_roots=[nowhere]")


def test_a_host_that_is_allowed_is_asked_and_sends_no_further(places: Path) -> None:
    with server(places) as (other, strange), server(places, f"http://127.0.0.1:{other}/b.png") as (port, asked):
        link = f"http://127.0.0.1:{port}"
        rows = [{"image": image, "messages": TALK} for image in (f"{link}/a.png", "media/red.png")]
        path = f"data.path={write(rows)}"
        with pytest.raises(Refused, match=rf"'data\.allow_hosts=\[127\.0\.0\.1:{port}\]'"):
            seen(path)
        assert asked == []
        made = seen(path, f'data.allow_hosts=["127.0.0.1:{port}"]')
        assert [row["input_ids"] for row in made] == [made[0]["input_ids"]] * 2
        assert asked == ["/a.png"]
        moved = f"data.path={write([{'image': f'{link}/moved', 'messages': TALK}])}"
        with pytest.raises(Refused, match=r"x\.jsonl:1: the link .* is not read: .* sends on to"):
            seen(moved, f'data.allow_hosts=["127.0.0.1:{port}"]')
        assert strange == []


def test_hosts_are_hosts() -> None:
    reach = Reach.of(DataConfig(allow_hosts=["Images.example.org"]))
    assert reach.answers("https://images.EXAMPLE.org/a.png")
    assert reach.answers("https://images.example.org:443/a.png")
    for link in (
        "https://images.example.org:8443/a.png",
        "https://images.example.org.evil.example/a.png",
        "https://images.example.org@evil.example/a.png",
        "https://evil.example/?images.example.org",
        "https://evil.example\\@images.example.org.x/",
        "ftp://images.example.org/a.png",
        "https://[images.example.org/a.png",
    ):
        assert not reach.answers(link), link
    with pytest.raises(Refused, match=r"is no host\n    fix: write 'data\.allow_hosts=\[a\.example\]'"):
        seen('data.allow_hosts=["https://a.example/"]')
