"""A repository is read by its headers, whatever the server does, and what cannot be had is one line."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.support.hub_server import COMMIT, Hub, serve

from seekforge.common.errors import CheckpointError
from seekforge.formats.checkpoint.hub import Repo, headers, parse_repo, resolve
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.quantization_forms import MODELOPT_FILE
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_index import INDEX_FILE
from seekforge.runtime.cli import main as cli

constants = pytest.importorskip("huggingface_hub.constants", reason="the hub extra is not installed")
FIRST = "model-00001-of-000003.safetensors"


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server of the tiny checkpoint, which is the hub of this process; the cache is empty."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "served"))
    with serve(folder) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_ENDPOINT", raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.chdir(tmp_path)
        yield server


def invoke(*args: str | Path) -> Result:
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*args: str | Path) -> str:
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "seekforge-hub-" not in result.stderr
    return lines[0]


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "repo"),
    [
        ("owner/name", Repo("owner/name")),
        ("owner/name/", Repo("owner/name")),
        ("owner/name@v1", Repo("owner/name", "v1")),
        ("owner/name@refs/pr/3", Repo("owner/name", "refs/pr/3")),
        ("hf://owner/name@v1", Repo("owner/name", "v1")),
        ("https://huggingface.co/owner/name", Repo("owner/name")),
        ("https://huggingface.co/owner/name/", Repo("owner/name")),
        ("http://hf.co/owner/name", Repo("owner/name")),
        ("huggingface.co/owner/name", Repo("owner/name")),
        ("https://huggingface.co/owner/name/tree/v1", Repo("owner/name", "v1")),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F3", Repo("owner/name", "refs/pr/3")),
        ("https://huggingface.co/owner/name/tree/refs/pr/3", Repo("owner/name", "refs/pr/3")),
        ("https://huggingface.co/owner/name/blob/main/config.json", Repo("owner/name", "main")),
        ("https://huggingface.co/owner/name?library=transformers#files", Repo("owner/name")),
        (str(Path("https://huggingface.co/owner/name")), Repo("owner/name")),
        ("name", None),
        ("/owner/name", None),
        ("./owner/name", None),
        ("a/b/c", None),
    ],
)
def test_a_repository_is_known_by_every_way_it_is_written(
    source: str, repo: Repo | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_repo(source) == repo


def test_a_local_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_repo("owner/name") is None and parse_repo("owner/name/") is None
    with headers("owner/name") as folder:
        assert folder == Path("owner/name")


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("https://huggingface.co/owner", None, "no address of a model"),
        ("https://huggingface.co/datasets/owner/name", None, "no address of a model"),
        ("https://example.com/owner/name", None, "set HF_ENDPOINT"),
        ("owner/name@v1", "v2", "names revision v1, and --revision is v2"),
    ],
)
def test_another_address_is_refused(source: str, revision: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_repo(source, revision)


# --- headers ----------------------------------------------------------------------------------------------------


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("how", ["as the hub", "without ranges", "without a listing", "redirected", "cut short"])
def test_headers_are_read_and_weights_are_not(how: str, hub: Hub, tiny_source: Checkpoint) -> None:
    hub.ranges, hub.lists = how != "without ranges", how != "without a listing"
    hub.redirects = how == "redirected"
    hub.cut = {"tokenizer.json": 30_000, FIRST: 9_000} if how == "cut short" else {}
    with headers("owner/name") as folder, Checkpoint.open(folder) as checkpoint:
        assert checkpoint.index_digest() == tiny_source.index_digest()
        for name in ("config.json", "tokenizer.json", "generation_config.json"):
            assert (folder / name).read_bytes() == (hub.folder / name).read_bytes()
    assert not folder.exists()
    # a server that ignores ranges has some of a file on the way before it notices that nobody reads on
    assert hub.sent < weight_bytes(hub.folder) // (1 if how == "without ranges" else 10)
    pinned = [path for _, path, _, _ in hub.requests if "/resolve/" in path][1:]
    assert all(f"/resolve/{COMMIT}/" in path for path in pinned)


def test_a_long_header_takes_a_second_request(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tiny_source: Checkpoint
) -> None:
    monkeypatch.setattr("seekforge.formats.checkpoint.hub_files._FIRST_BYTES", 64)
    with headers("owner/name") as folder, Checkpoint.open(folder) as checkpoint:
        assert checkpoint.index_digest() == tiny_source.index_digest()


def test_shards_without_an_index_are_found_by_the_listing(hub: Hub, tiny_source: Checkpoint) -> None:
    (hub.folder / INDEX_FILE).unlink()
    with headers("owner/name") as folder, Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.names) == set(tiny_source.names)


def test_retries_say_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command prints of a hub that is not there is one line."""
    said: list[str] = []
    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(logger, "handle", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.url = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert "try again online" in refused("inspect", "owner/name")
    assert not said


def test_a_plan_reads_config_alone(hub: Hub) -> None:
    assert invoke("plan", "owner/name", "--target", "h200", "--contexts", "1K", "--json").exit_code == 0
    assert [path.rpartition("/")[2] for _, path, _, _ in hub.requests if "/resolve/" in path] == ["config.json"]


def test_a_plan_reads_what_modelopt_says_beside_config(hub: Hub) -> None:
    """Else weights of NVFP4 would be planned as BF16, at nearly four times their bytes."""
    raw = json.loads((hub.folder / "config.json").read_text())
    del raw["quantization_config"]
    (hub.folder / "config.json").write_text(json.dumps(raw))
    with headers("owner/name", config_only=True) as folder:
        assert ModelConfig.load(folder).stored_form == "bf16"
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (hub.folder / MODELOPT_FILE).write_text(json.dumps(said))
    with headers("owner/name", config_only=True) as folder:
        assert ModelConfig.load(folder).stored_form == "nvfp4"


def test_export_and_inspect_take_a_repository(hub: Hub, tmp_path: Path, tiny_programs: dict[str, Path]) -> None:
    result = invoke("export", f"{hub.url}/owner/name/tree/main", tmp_path / "program")
    assert result.exit_code == 0, result.output
    assert "--checkpoint owner/name@main" in result.stdout
    for name in ("model.onnx", "mtp.onnx", "bindings.json", "tokenizer.json"):
        assert (tmp_path / "program" / name).read_bytes() == (tiny_programs["fp8"] / name).read_bytes()
    about = json.loads(invoke("inspect", "owner/name", "--json").stdout)
    assert about["path"] == "owner/name" and about["num_bytes"] > 20_000_000
    assert hub.sent < weight_bytes(hub.folder) // 5


def test_a_dry_run_reads_headers_alone(hub: Hub, tmp_path: Path, tiny_programs: dict[str, Path]) -> None:
    args = (
        "build",
        tiny_programs["fp8"],
        tmp_path / "out",
        "--target",
        "cpu",
        "--checkpoint",
        "owner/name",
        "--dry-run",
    )
    assert invoke(*args, "--json").exit_code == 0
    assert hub.sent < weight_bytes(hub.folder) // 10


# --- what cannot be had -----------------------------------------------------------------------------------------


def test_a_token_is_used_and_its_absence_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    line = refused("inspect", "owner/name")
    assert "401" in line and "set HF_TOKEN" in line
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "403" in refused("inspect", "owner/name")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert invoke("inspect", "owner/name").exit_code == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("owner/other", "has none of that name (status 404)"),
        ("owner/name@v9", "has no revision 'v9'"),
    ],
)
def test_a_repository_that_is_not_there(source: str, message: str, hub: Hub) -> None:
    for command in ("inspect", "plan"):
        assert message in refused(command, source)


def oversized(path: Path) -> None:
    path.write_bytes((10**15).to_bytes(8, "little") + path.read_bytes()[8:])


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def nonsense(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"#" + raw[9:])


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (FIRST, oversized, "says its header is 1000000000000000 bytes"),
        (FIRST, lfs_pointer, "is a Git LFS pointer"),
        (FIRST, nonsense, "not valid JSON"),
        (FIRST, Path.unlink, f"has no {FIRST}"),
        ("config.json", Path.unlink, "has no config.json"),
        ("tokenizer.json", Path.unlink, "owner/name/tokenizer.json: missing"),
    ],
)
def test_a_damaged_repository_is_named(file: str, damage: object, message: str, hub: Hub, tmp_path: Path) -> None:
    damage(hub.folder / file)  # pyright: ignore
    line = refused("export", "owner/name", tmp_path / "out")
    assert message in line and "owner/name" in line
    assert hub.sent < weight_bytes(hub.folder) // 2


def test_a_file_that_always_ends_early_is_named(hub: Hub) -> None:
    hub.cut = {"config.json": 0}
    assert "ended after 0 bytes" in refused("inspect", "owner/name")


def test_nobody_at_the_address_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert "the Hugging Face hub does not give it" in refused("plan", "owner/name")


# --- the cache, and downloads -------------------------------------------------------------------------------------


def run(hub: Hub, *args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, as huggingface_hub reads its environment when it is imported."""
    usual = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    chosen = usual | {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.folder.parent / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "seekforge", *map(str, args)]
    return subprocess.run(command, env=chosen | environment, capture_output=True, text=True, timeout=300, check=False)


def test_weights_are_downloaded_once_and_then_used_offline(
    hub: Hub, tmp_path: Path, tiny_programs: dict[str, Path]
) -> None:
    args = (
        "build",
        tiny_programs["fp8"],
        tmp_path / "engine",
        "--target",
        "cpu",
        "--checkpoint",
        "owner/name",
        "--json",
    )
    offline = run(hub, *args, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and offline.stderr.count("\n") == 1, offline.stderr
    assert "HF_HUB_OFFLINE" in offline.stderr and not hub.requests
    built = run(hub, *args)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "engine" / "weights.bin").is_file()
    hub.requests.clear()
    about = run(hub, "inspect", "owner/name", "--json", HF_HUB_OFFLINE="1")
    assert about.returncode == 0 and json.loads(about.stdout)["num_shards"] == 3, about.stderr
    assert not hub.requests


def test_a_snapshot_in_part_is_not_taken_for_a_whole_one(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub.folder.parent / "part").mkdir()
    for name in ("config.json", INDEX_FILE):
        shutil.copyfile(hub.folder / name, hub.folder.parent / "part" / name)
    asked: list[bool] = []

    def snapshot_download(name: str, *, local_files_only: bool = False, **options: object) -> str:
        asked.append(local_files_only)
        return str(hub.folder.parent / "part" if local_files_only else hub.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("owner/name") == hub.folder and asked == [True, False]
