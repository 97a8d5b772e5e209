"""Models from hubs, against a hub on the loopback that speaks both protocols and misbehaves."""

import copy
import json
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import llama_checkpoints
import loopback_hub
import pytest
import torch
from api_server import MODEL, eventually, running

from octavo.config import EngineConfig, hub_settings, model_source, parse_serve_args
from octavo.engine.locate import check_servable, locate
from octavo.errors import ConfigError, FetchError, FetchRefusedError, ModelError, OctavoError
from octavo.hub import client, fetch
from octavo.hub.repository import HubSettings, Reference, looks_like_reference, parse_reference

NAME = "org/tiny"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of two shards, a tokenizer, and things that nobody needs."""
    folder = llama_checkpoints.write(tmp_path_factory.mktemp("model"), shards=2)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found["tokenizer.json"] = json.dumps({"padding": "x" * 3000}).encode()
    found["README.md"] = b"# A model"
    found["pytorch_model.bin"] = b"\x80\x02}q\x00."
    found["onnx/model.safetensors"] = b"not wanted"
    found["run.py"] = b"raise SystemExit"
    return found


WANTED = {
    "config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
}
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def hub(files, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.001)
    with loopback_hub.running() as found:
        found.add(NAME, dict(files))
        yield found


@pytest.fixture(params=["hub", "modelscope"])
def kind(request):
    return request.param


def get(hub, kind, tmp_path, reference=NAME, *, token=None, offline=False, check=check_servable):
    settings = HubSettings(kind, hub.url, tmp_path / "cache", token, offline)
    ratios = []
    folder = fetch.fetch(parse_reference(reference), settings, ratios.append, check)
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (0, 1) or len(ratios) == 1
    return folder


def visible(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_what_is_needed_comes_whole_and_nothing_else(hub, kind, files, tmp_path):
    folder = get(hub, kind, tmp_path)
    assert visible(folder) == WANTED
    for name in WANTED:
        assert (folder / name).read_bytes() == files[name]
    assert not list(folder.glob("*.incomplete")) + list(folder.glob(".*.incomplete"))
    # A second start asks for the list and fetches nothing.
    before = len(hub.fetched())
    assert get(hub, kind, tmp_path) == folder
    assert len(hub.fetched()) == before == len(WANTED)


def test_the_model_s_own_code_comes_only_when_it_is_trusted(hub, kind, tmp_path):
    settings = HubSettings(kind, hub.url, tmp_path)
    reference = parse_reference(NAME)
    assert visible(fetch.fetch(reference, settings, print, check_servable)) == WANTED
    folder = fetch.fetch(reference, settings, print, check_servable, code=True)
    assert visible(folder) == WANTED | {"run.py"}


def test_a_model_for_the_transformers_back_end_is_fetched_too(hub, files, tmp_path):
    from transformers import PersimmonConfig

    config = PersimmonConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=96, architectures=["PersimmonForCausalLM"],
    )  # fmt: skip
    hub.add(NAME, {**files, "config.json": config.to_json_string().encode()})
    assert visible(get(hub, "hub", tmp_path)) == WANTED


def test_a_revision_is_pinned(hub, kind, files, tmp_path):
    old = hub.add(NAME, {**files, "config.json": files["config.json"] + b"\n"}, v1="")
    for reference in (f"{NAME}@v1", f"{NAME}@{old}"):
        folder = get(hub, kind, tmp_path, reference)
        assert (folder / "config.json").read_bytes().endswith(b"\n")
        assert folder != get(hub, kind, tmp_path)
    if kind == "hub":
        assert folder.name == old
    with pytest.raises(FetchRefusedError, match="no such model, revision or file"):
        get(hub, kind, tmp_path, f"{NAME}@v2")


def test_a_branch_that_moves_is_followed_and_its_old_files_stay(hub, files, tmp_path):
    old = get(hub, "hub", tmp_path)
    hub.add(NAME, {**files, "config.json": files["config.json"] + b"\n"})
    new = get(hub, "hub", tmp_path)
    assert old != new
    assert (old / "config.json").read_bytes() + b"\n" == (new / "config.json").read_bytes()


def test_a_cut_connection_goes_on_where_it_broke(hub, kind, files, tmp_path):
    hub.cuts = [0, 1, 100, 1000, 3000]
    folder = get(hub, kind, tmp_path)
    assert all((folder / name).read_bytes() == files[name] for name in WANTED)
    assert any(asked for _, asked in hub.fetched())
    hub.cuts = []


def test_a_silent_connection_counts_as_cut(hub, files, tmp_path):
    hub.gate = threading.Event()
    threading.Timer(0.5, lambda: (hub.gate.set(), setattr(hub, "gate", None))).start()
    settings = HubSettings("hub", hub.url, tmp_path, timeout_s=0.2)
    folder = fetch.fetch(parse_reference(NAME), settings, lambda _: None, check_servable)
    assert all((folder / name).read_bytes() == files[name] for name in WANTED)
    assert any(asked for _, asked in hub.fetched())


def test_a_later_start_resumes(hub, kind, files, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(fetch, "PARALLEL_FILES", 1)
    small = len(WANTED) - 2
    hub.cuts = [10**6] * small + [2000]
    with pytest.raises(FetchError, match="cannot be reached") as caught:
        get(hub, kind, tmp_path)
    assert caught.value.retryable
    hub.requests.clear()
    hub.cuts = []
    folder = get(hub, kind, tmp_path)
    assert (SHARD, "bytes=2000-") in hub.fetched()
    assert len(hub.fetched()) == 2
    assert all((folder / name).read_bytes() == files[name] for name in WANTED)


def test_a_store_that_knows_no_ranges_starts_again(hub, kind, files, tmp_path):
    hub.ranges = False
    hub.cuts = [100, 200]
    folder = get(hub, kind, tmp_path)
    assert all((folder / name).read_bytes() == files[name] for name in WANTED)


def test_a_busy_store_is_asked_again(hub, kind, files, tmp_path):
    hub.statuses = [503, 429, 500]
    folder = get(hub, kind, tmp_path)
    assert all((folder / name).read_bytes() == files[name] for name in WANTED)


def test_a_hub_that_is_gone_is_a_failure_that_may_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.001)
    with loopback_hub.running() as gone:
        pass
    with pytest.raises(FetchError, match=r"cannot be reached .*refused.*after 6 att") as caught:
        get(gone, "hub", tmp_path)
    assert caught.value.retryable


def test_a_hub_that_is_gone_does_not_matter_once_all_is_there(hub, kind, tmp_path):
    folder = get(hub, kind, tmp_path)
    hub.requests.clear()
    assert get(hub, kind, tmp_path, offline=True) == folder
    assert hub.requests == []
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE"):
        get(hub, kind, tmp_path / "other", offline=True)


REFUSALS = [
    ({"token": "s3cret"}, None, "does not let us in with no token given"),
    ({"token": "s3cret"}, "wrong", "does not let us in with the token given"),
    ({"forbidden": True}, "s3cret", "forbids access .*accept the model's conditions"),
    ({"repositories": {}}, None, "has no such model, revision or file"),
    ({"statuses": [418]}, None, "answers with status 418"),
]


@pytest.mark.parametrize(("state", "token", "text"), REFUSALS)
def test_a_refusal_is_one_sentence_and_final(hub, kind, state, token, text, tmp_path):
    for key, value in state.items():
        setattr(hub, key, copy.copy(value))
    with pytest.raises(FetchRefusedError, match=text) as caught:
        get(hub, kind, tmp_path, token=token)
    assert not caught.value.retryable
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_token_goes_to_the_hub_and_never_to_its_store(hub, kind, tmp_path):
    hub.token = "s3cret"
    get(hub, kind, tmp_path, token="s3cret")
    for method, _, headers in hub.requests:
        assert ("s3cret" in str(headers)) == (method != "STORE")


EVIL = [
    "../evil.safetensors",
    "a/../../evil.json",
    "/etc/evil.json",
    "..",
    "a\\..\\evil.json",
    "evil\0.json",
    "a//evil.json",
    "x" * 300 + ".json",
]


@pytest.mark.parametrize("name", EVIL)
def test_a_name_that_leaves_the_folder_is_refused_before_a_byte_is_fetched(
    hub, kind, name, files, tmp_path
):
    hub.add(NAME, {**files, name: b"{}"})
    with pytest.raises(FetchRefusedError, match="no name inside a folder"):
        get(hub, kind, tmp_path)
    assert hub.fetched() == []


def test_a_commit_that_is_no_commit_is_refused(hub, files, tmp_path):
    repository = hub.repositories[NAME]
    repository.commits["../../evil"] = files
    repository.refs["main"] = "../../evil"
    with pytest.raises(FetchError, match="names no commit"):
        get(hub, "hub", tmp_path)


def test_pickles_alone_are_refused_by_name(hub, kind, files, tmp_path):
    hub.add(NAME, {n: d for n, d in files.items() if not n.endswith(".safetensors")})
    with pytest.raises(ModelError, match=r"no safetensors files; pytorch_model\.bin is a format"):
        get(hub, kind, tmp_path)
    hub.add(NAME, {"config.json": b"{}"})
    with pytest.raises(ModelError, match="Octavo loads no other format"):
        get(hub, kind, tmp_path)
    assert hub.fetched() == []


def test_damaged_bytes_are_found(hub, kind, files, tmp_path):
    hub.damage = True
    with pytest.raises(FetchError, match="changed or was damaged on the way"):
        get(hub, kind, tmp_path)
    hub.damage = False
    folder = get(hub, kind, tmp_path)
    assert all((folder / name).read_bytes() == files[name] for name in WANTED)


def test_a_file_longer_than_listed_is_refused(hub, kind, files, tmp_path):
    hub.sizes = {SHARD: len(files[SHARD]) - 1}
    with pytest.raises(FetchError, match="is longer than the"):
        get(hub, kind, tmp_path)


def test_a_model_that_is_not_served_costs_no_weights(hub, kind, files, tmp_path):
    config = json.loads(files["config.json"]) | {"architectures": ["MambaForCausalLM"]}
    hub.add(NAME, {**files, "config.json": json.dumps(config).encode()})
    with pytest.raises(ModelError, match="MambaForCausalLM"):
        get(hub, kind, tmp_path)
    assert not any(name.endswith(".safetensors") for name, _ in hub.fetched())


def test_too_little_space_is_told_before_the_weights(hub, kind, tmp_path, monkeypatch):
    usage = fetch.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(FetchRefusedError, match=r"weights need 0\.00 GiB more and .* free; give"):
        get(hub, kind, tmp_path)
    assert not any(name.endswith(".safetensors") for name, _ in hub.fetched())


def test_the_hub_s_own_client_speaks_with_this_hub_and_reads_our_cache(hub, tmp_path):
    """The oracle: the protocol here is the real one, and so is the cache's layout."""
    ours = get(hub, "hub", tmp_path)
    code = (
        "import sys; from huggingface_hub import snapshot_download as s; from pathlib import Path\n"
        "name, cache, other = sys.argv[1:]\n"
        "print(s(name, cache_dir=cache, local_files_only=True, allow_patterns=['*.json']))\n"
        "print(s(name, cache_dir=other, allow_patterns=['*.json', 'model-*.safetensors']))"
    )
    words = [sys.executable, "-c", code, NAME, str(tmp_path / "cache"), str(tmp_path / "theirs")]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    found, theirs = done.stdout.splitlines()[-2:]
    assert found == str(ours)
    for name in WANTED:
        assert (ours / name).read_bytes() == (Path(theirs) / name).read_bytes()


def test_ten_cuts_at_random_places(hub, kind, files, tmp_path):
    random.seed(5)
    for i in range(10):
        hub.cuts = [random.randrange(4000) for _ in range(8)]
        folder = get(hub, kind, tmp_path / str(i))
        assert all((folder / name).read_bytes() == files[name] for name in WANTED)


REFERENCES = [
    ("org/name", Reference("org/name")),
    ("gpt2", Reference("gpt2")),
    ("org/name@v1.0", Reference("org/name", "v1.0")),
    ("org/name@refs/pr/3", Reference("org/name", "refs/pr/3")),
]


@pytest.mark.parametrize(("text", "reference"), REFERENCES)
def test_references(text, reference):
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "text", ["", "/a/b", "a/b/c", "../a", "a/..", "a b/c", "a/b@", "a/b@../x", "a/b@x@y", "-a/b"]
)
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(ConfigError, match=re.escape(repr(text.partition("@../")[0])[:-1])):
        parse_reference(text)
    assert not looks_like_reference(text)


def test_an_explicit_revision_does_not_contradict():
    assert parse_reference("a/b", "v1") == parse_reference("a/b@v1", "v1") == Reference("a/b", "v1")
    with pytest.raises(ConfigError, match="MODEL names revision 'v1', --revision 'v2'"):
        parse_reference("a/b@v1", "v2")


def test_where_a_model_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/here").mkdir(parents=True)
    monkeypatch.delenv("OCTAVO_USE_MODELSCOPE", raising=False)
    monkeypatch.delenv("VLLM_USE_MODELSCOPE", raising=False)

    def source(model, asked="auto"):
        return model_source(EngineConfig(model=model, source=asked))

    assert source("org/name") == source("x", "hub") == "hub"
    assert source("org/here") == source("/a/b") == source("./a") == source("gpt2") == "path"
    assert source("org/name", "path") == "path"
    for switch in ("OCTAVO_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"):
        monkeypatch.setenv(switch, "True")
        assert source("org/name") == "modelscope"
        assert source("org/name", "hub") == "hub"
        assert source("org/here") == "path"
        monkeypatch.delenv(switch)
    assert parse_serve_args(["org/name@v1"]).served_model_names == ("org/name",)
    assert parse_serve_args(["org/here"]).served_model_names == ("org/here",)


def test_settings_come_from_the_variables_that_the_hubs_clients_read(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("HF_", "MODELSCOPE_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    caches = tmp_path / ".cache"
    assert hub_settings("hub") == HubSettings(
        "hub", "https://huggingface.co", caches / "huggingface/hub"
    )
    assert hub_settings("modelscope") == HubSettings(
        "modelscope", "https://www.modelscope.cn", caches / "modelscope/hub"
    )
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text("from-file\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1/")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = hub_settings("hub")
    assert found == HubSettings(
        "hub", "http://127.0.0.1:1", tmp_path / "hf/hub", "from-file", offline=True
    )
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "7")
    assert hub_settings("hub").timeout_s == 7
    for wrong in ("x", "0", "-1", "nan", "1e9"):
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", wrong)
        with pytest.raises(ConfigError, match=r"HF_HUB_DOWNLOAD_TIMEOUT must be in"):
            hub_settings("hub")
    monkeypatch.delenv("HF_HUB_DOWNLOAD_TIMEOUT")
    monkeypatch.setenv("HF_TOKEN", "given")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:2")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "mine")
    assert hub_settings("hub").token == "given"
    assert hub_settings("modelscope") == HubSettings(
        "modelscope", "http://127.0.0.1:2", tmp_path / "ms", "mine"
    )


def test_the_engine_fetches_and_says_where(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    progress, folders = [], []
    config = EngineConfig(model=NAME, source="hub", revision="main")
    found = locate(config, lambda *words: progress.append(words), folders.append)
    assert (found.source, found.revision) == ("path", None)
    assert folders == [found.model]
    assert progress[-1] == ("fetch", 1.0)
    assert locate(found, lambda *_: None, folders.append) is found
    with pytest.raises(ConfigError, match="--revision is for a hub's model"):
        locate(EngineConfig(model="/m", revision="x"), lambda *_: None, folders.append)


def test_the_offline_class_takes_a_hub_s_model(hub, tmp_path, monkeypatch):
    from octavo import LLM, SamplingParams

    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    torch.set_num_threads(1)
    llm = LLM(
        NAME,
        device="cpu",
        num_kv_blocks=8,
        num_threads=1,
        skip_tokenizer_init=True,
        revision="main",
    )
    (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 3


def test_the_server_shows_the_fetch_and_then_serves(hub, tmp_path, monkeypatch):
    hub.add("org/real", {p.name: p.read_bytes() for p in MODEL.iterdir()}, v1="")
    hub.gate = threading.Event()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    flags = ("--source", "hub", "--device", "cpu", "--num-kv-blocks", "64", "--num-threads", "1")
    model = Path("org/real@v1")
    with running(tmp_path, *flags, engine=None, ready=False, model=model) as server:
        try:
            eventually(lambda: server.load()["progress"]["phase"] == "fetch", 60, "the fetch")
            started = server.http.get("/startupz")
            assert started.status_code == 503
            assert "fetch" in started.text
            refused = server.http.post("/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503
        finally:
            hub.gate.set()
        server.until_ready(90)
        answer = server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 4})
        assert answer.status_code == 200


def test_a_model_that_the_hub_does_not_have_is_told_where_the_operator_looks(
    hub, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    model = Path("org/nothing")
    flags = ("--source", "hub")
    with running(tmp_path, *flags, engine=None, ready=False, model=model) as server:
        eventually(lambda: server.load()["state"] == "Failed", 60, "the failure")
        failure = server.load()["failure"]
        assert (failure["reason"], failure["retryable"]) == ("ModelFetchRefused", False)
        assert "has no such model" in failure["message"]
        assert server.process.poll() is None


def test_hub_errors_are_errors_for_users():
    assert issubclass(FetchError, OctavoError)
    assert (FetchError.reason, FetchError.retryable) == ("ModelFetchFailed", True)
    assert (FetchRefusedError.reason, FetchRefusedError.retryable) == ("ModelFetchRefused", False)
