"""Flags, their errors, and what the container allows."""

import subprocess
import sys
from pathlib import Path

import pytest

from octavo import cli
from octavo.config import (
    EngineConfig,
    cache_folder,
    limit_threads,
    parse_serve_args,
    token_budget,
)
from octavo.cpus import cpu_limit
from octavo.errors import ConfigError, ExitCode


def test_defaults_are_those_of_the_documentation():
    config = parse_serve_args(["/models/m"])
    assert (config.host, config.port) == ("0.0.0.0", 8000)
    assert config.served_model_names == ("/models/m",)
    assert (config.drain_timeout, config.startup_stall_timeout) == (110, 120)
    engine = config.engine
    assert (engine.model, engine.block_size, engine.max_num_seqs) == ("/models/m", 16, 256)
    assert engine.gpu_memory_utilization == 0.90
    assert engine.num_kv_blocks is engine.max_model_len is engine.max_num_batched_tokens is None
    assert engine.num_threads == cpu_limit()
    assert engine.enable_prefix_caching


def test_every_flag_reaches_its_field():
    flags = (
        "/m --host ::1 --port 9000 --served-model-name a b --served-model-name c --device cpu "
        "--dtype float32 --block-size 8 --num-kv-blocks 64 --gpu-memory-utilization 0.5 "
        "--max-model-len 128 --max-num-seqs 4 --max-num-batched-tokens 32 --seed 7 "
        "--scheduling-policy priority --drain-timeout 3 --startup-stall-timeout 5 --max-queue 9 "
        "--chat-template x.jinja --source path --num-threads 3 --no-enable-prefix-caching "
        "--target-itl-ms 40 --pipeline-depth 2"
    )
    config = parse_serve_args(flags.split())
    assert config.engine == EngineConfig(
        model="/m",
        source="path",
        device="cpu",
        dtype="float32",
        block_size=8,
        num_kv_blocks=64,
        gpu_memory_utilization=0.5,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        scheduling_policy="priority",
        enable_prefix_caching=False,
        target_itl_ms=40,
        pipeline_depth=2,
        seed=7,
        num_threads=3,
    )
    assert (config.host, config.port, config.max_queue) == ("::1", 9000, 9)
    assert config.served_model_names == ("a", "b", "c")
    assert (config.drain_timeout, config.startup_stall_timeout) == (3, 5)
    assert (config.chat_template, config.source) == ("x.jinja", "path")


def test_the_engine_configuration_survives_its_journey():
    engine = parse_serve_args(["/models/ü \"'", "--num-kv-blocks", "5"]).engine
    assert EngineConfig.from_json(engine.to_json()) == engine


@pytest.mark.parametrize("text", ["", "{}", '{"model": 3}', '{"model": "m", "block_size": 0}'])
def test_a_broken_engine_configuration_is_refused(text):
    with pytest.raises(ConfigError):
        EngineConfig.from_json(text)


WRONG = [
    ("/m --max-model-length 5", "unknown flag --max-model-length; did you mean --max-model-len?"),
    ("/m --max-modl-len=5", "unknown flag --max-modl-len; did you mean --max-model-len?"),
    ("/m --max-model 5", "unknown flag --max-model; did you mean --max-model-len?"),
    ("/m --zzz", "unknown flag --zzz; see octavo serve --help"),
    ("/m /n", "unexpected argument '/n'"),
    ("", "the following arguments are required: MODEL"),
    ("/m --port x", "argument --port: invalid int value: 'x'"),
    ("/m --port 65536", "--port must be in 0..65535, got 65536"),
    ("/m --block-size 0", "--block-size must be in 1..256, got 0"),
    ("/m --num-kv-blocks 0", "--num-kv-blocks must be in 1.."),
    ("/m --gpu-memory-utilization 1.1", "--gpu-memory-utilization must be in 0.01..1, got 1.1"),
    ("/m --gpu-memory-utilization nan", "--gpu-memory-utilization must be in 0.01..1, got nan"),
    ("/m --max-model-len 1", "--max-model-len must be in 2.."),
    ("/m --max-num-seqs 0", "--max-num-seqs must be in 1.."),
    ("/m --max-num-batched-tokens 0", "--max-num-batched-tokens must be in 1.."),
    ("/m --num-threads 0", "--num-threads must be in 1.."),
    ("/m --drain-timeout -1", "--drain-timeout must be in 0.."),
    ("/m --max-queue 0", "--max-queue must be in 1.."),
    ("/m --device tpu", "argument --device: invalid choice: 'tpu'"),
    ("/m --scheduling-policy lifo", "argument --scheduling-policy: invalid choice: 'lifo'"),
]


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_a_wrong_flag_is_named_with_what_would_be_right(flags, text):
    with pytest.raises(ConfigError) as caught:
        parse_serve_args(flags.split())
    assert text in str(caught.value)


def test_the_command_says_what_is_wrong_where_kubernetes_looks(tmp_path, monkeypatch, capsys):
    log = tmp_path / "termination-log"
    monkeypatch.setenv("OCTAVO_TERMINATION_LOG", str(log))
    assert cli.main(["serve", "/m", "--prot", "80"]) == ExitCode.CONFIG
    message = "unknown flag --prot; did you mean --port?"
    assert log.read_text() == message
    assert capsys.readouterr().err == f"octavo: {message}\n"
    monkeypatch.setenv("OCTAVO_TERMINATION_LOG", str(tmp_path / "no" / "such" / "folder"))
    assert cli.main(["sevre"]) == ExitCode.CONFIG


def test_the_command_starts_without_torch_or_the_web_stack():
    code = (
        "import sys; from octavo.cli import main; main(['version']); "
        "print(sorted({'torch', 'fastapi', 'transformers', 'numpy', 'zmq'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["0.1.0", "[]"]


def test_threads_are_bounded_before_the_libraries_look(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("MKL_NUM_THREADS", "64")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "64")
    limit_threads(3)
    import os

    assert os.environ["OMP_NUM_THREADS"] == "3"


def tree(root, files):
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


CGROUPS = [
    ("no limit, v2", "0::/\n", {"cpu.max": "max 100000\n"}, 16),
    ("container, v2", "0::/\n", {"cpu.max": "400000 100000\n"}, 4),
    ("a fraction rounds down", "0::/\n", {"cpu.max": "250000 100000\n"}, 2),
    ("never below one", "0::/\n", {"cpu.max": "20000 100000\n"}, 1),
    ("parent bounds, v2", "0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 1"}, 3),
    ("path of the host", "0::/kubepods/pod1/c1\n", {"cpu.max": "200000 100000"}, 2),
    (
        "container, v1",
        "3:cpuset:/\n2:cpu,cpuacct:/kubepods/x\n",
        {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "50000\n"},
        3,
    ),
    (
        "no limit, v1",
        "1:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        16,
    ),
    (
        "v1 without the short link",
        "2:cpu,cpuacct:/x\n",
        {
            "cpu,cpuacct/x/cpu.cfs_quota_us": "500000",
            "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
        },
        5,
    ),
    ("nothing to read", "", {}, 16),
]


@pytest.mark.parametrize(
    ("membership", "files", "cpus"), [case[1:] for case in CGROUPS], ids=[c[0] for c in CGROUPS]
)
def test_the_cpu_limit_is_the_containers(tmp_path, monkeypatch, membership, files, cpus):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    tree(tmp_path, files)
    (tmp_path / "self").write_text(membership)
    assert cpu_limit(tmp_path / "cgroup", tmp_path / "self") == cpus


def test_affinity_bounds_too(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5})
    tree(tmp_path, {"cpu.max": "400000 100000"})
    (tmp_path / "self").write_text("0::/\n")
    assert cpu_limit(tmp_path / "cgroup", tmp_path / "self") == 1


def test_what_is_said_of_a_step_s_tokens_is_what_a_step_has(capsys):
    """Help and memory plan name the budget that the engine takes."""
    on_gpu, on_cpu = token_budget(None, "cuda"), token_budget(None, "cpu")
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert f"default {on_gpu}; {on_cpu} on the CPU" in words
    args = cli.build_parser().parse_args(["plan", "m", "--gpu", "h100"])
    assert args.max_num_batched_tokens == on_gpu


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"OCTAVO_CACHE": "/c"}, Path("/c")),
        ({"OCTAVO_CACHE": ""}, None),
        ({"OCTAVO_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, Path("/c")),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/octavo")),
        ({"HOME": "/h"}, Path("/h/.cache/octavo")),
        ({"HOME": "/h", "XDG_CACHE_HOME": ""}, Path("/h/.cache/octavo")),
    ],
)
def test_where_measurements_are_kept(environment, folder, monkeypatch):
    for name in ("OCTAVO_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == folder


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("OCTAVO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() is None
