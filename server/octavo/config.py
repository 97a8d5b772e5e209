"""Configuration: frozen dataclasses, their flags, and the only code that reads the environment."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from octavo.core.policy import PolicyFactory
from octavo.cpus import cpu_limit, text_of
from octavo.errors import ConfigError
from octavo.hub.repository import DEFAULT_TIMEOUT_S, HubSettings, looks_like_reference

DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
GENERATION_CONFIGS = ("auto", "vllm")
SOURCES = ("auto", "hub", "modelscope", "path")
DEFAULT_TERMINATION_LOG = "/dev/termination-log"
_TOKEN_BUDGETS = {"cpu": 512, "cuda": 2048}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine process needs to know; travels to it as JSON.

    None means that the engine decides once it knows the model and the device: `num_kv_blocks` from
    memory, `max_model_len` from the model, `max_num_batched_tokens` from the device
    (`token_budget`), `pipeline_depth` 2 (1 on the CPU), `num_threads` from the container's CPU
    limit.
    """

    model: str
    source: str = "auto"
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    block_size: int = 16
    num_kv_blocks: int | None = None
    gpu_memory_utilization: float = 0.90
    swap_space: float = 0.0
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    scheduling_policy: str = "fcfs"
    enable_prefix_caching: bool = True
    target_itl_ms: float | None = None
    pipeline_depth: int | None = None
    seed: int = 0
    num_threads: int | None = None
    trust_remote_code: bool = False
    hf_overrides: dict[str, Any] | None = None
    load_format: str = "auto"
    enforce_eager: bool = False
    deterministic: bool = False

    def to_json(self) -> str:
        """The form that the engine process takes on its command line."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        """Read `to_json`'s form; a wrong key or type is a `ConfigError`."""
        try:
            config = msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"engine configuration: {error}") from error
        _validate_engine(config)
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What `octavo serve` was asked to do. Times are in seconds."""

    engine: EngineConfig
    host: str = "0.0.0.0"
    port: int = 8000
    served_model_names: tuple[str, ...]
    drain_timeout: float = 110.0
    startup_stall_timeout: float = 120.0
    max_queue: int = 2048
    chat_template: str | None = None
    generation_config: str = "auto"
    termination_log: str = DEFAULT_TERMINATION_LOG

    @property
    def source(self) -> str:
        """Where the model comes from: auto, hub, modelscope or path."""
        return self.engine.source


def token_budget(asked: int | None, device_type: str) -> int:
    """Tokens of one step: what was asked for, else what suits the device."""
    return asked or _TOKEN_BUDGETS[device_type]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`s and that accepts no abbreviations."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage and leaving."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `octavo serve`; names shared with vLLM mean the same."""
    parser.add_argument("model", metavar="MODEL", help="model folder: config, tokenizer, weights")
    _add_http_arguments(parser.add_argument_group("endpoint"))
    _add_model_arguments(parser.add_argument_group("model"))
    _add_scheduler_arguments(parser.add_argument_group("cache and scheduling"))


def _add_http_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--host", default="0.0.0.0", help="address to listen on (default %(default)s)")
    add("--port", type=int, default=8000, help="port to listen on (default %(default)s)")
    add(
        "--served-model-name",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="names that requests may use; the first is shown (default MODEL)",
    )
    add("--chat-template", metavar="FILE_OR_TEXT", help="instead of the tokenizer's own")
    add(
        "--generation-config",
        choices=GENERATION_CONFIGS,
        default="auto",
        help="sampling of requests that name none: auto is the model's generation_config.json, "
        "vllm is temperature 1 and nothing else (default %(default)s)",
    )
    add(
        "--max-queue",
        type=int,
        default=2048,
        metavar="N",
        help="unfinished requests beyond which new ones get 429 (default %(default)s)",
    )
    add(
        "--drain-timeout",
        type=float,
        default=110.0,
        metavar="SECONDS",
        help="after SIGTERM, time for running requests to finish (default %(default)s)",
    )
    add(
        "--startup-stall-timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="exit when the start makes no progress for this long (default %(default)s)",
    )


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--source",
        choices=SOURCES,
        default="auto",
        help="where MODEL is; auto: a folder if there is one, else the hub, or ModelScope if "
        "OCTAVO_USE_MODELSCOPE is set (default %(default)s)",
    )
    add("--revision", help="branch, tag or commit of a hub's model (or write MODEL@REVISION)")
    add("--device", choices=DEVICES, default="auto", help="default: cuda when there is one")
    add("--dtype", choices=DTYPES, default="auto", help="default: the model's; float32 on the CPU")
    add(
        "--max-model-len",
        type=int,
        metavar="TOKENS",
        help="longest prompt and output together (default: the model's)",
    )
    add("--seed", type=int, default=0, help="seed of requests without one (default %(default)s)")
    add(
        "--num-threads",
        type=int,
        metavar="N",
        help="CPU threads of the engine (default: the container's CPU limit)",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code out of the model's folder where config.json names some; only for "
        "folders whose authors may do what this server may",
    )

    add(
        "--load-format",
        choices=LOAD_FORMATS,
        default="auto",
        help="dummy: random weights, config.json is all that is needed (default %(default)s)",
    )
    add(
        "--hf-overrides",
        type=_json_object,
        metavar="JSON",
        help="an object whose values take the place of those in the model's config.json",
    )
    add(
        "--enforce-eager",
        action="store_true",
        help="capture no CUDA graphs: slower steps, for finding errors",
    )
    add(
        "--deterministic",
        action="store_true",
        help="on a GPU too, a request's tokens do not depend on what else is in its batch; slower",
    )


def _add_scheduler_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--block-size",
        type=int,
        default=16,
        metavar="TOKENS",
        help="tokens in a KV block (default %(default)s)",
    )
    add("--num-kv-blocks", type=int, metavar="N", help="size of the KV cache (default: by memory)")
    add(
        "--gpu-memory-utilization",
        type=float,
        default=0.90,
        metavar="RATIO",
        help="share of the device's memory to use (default %(default)s)",
    )
    add("--swap-space", type=float, default=0.0, metavar="GIB", help="host memory for preempted KV")
    add(
        "--max-num-seqs",
        type=int,
        default=256,
        metavar="N",
        help="sequences that run at once (default %(default)s)",
    )
    add(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help=f"tokens in one step (default {_TOKEN_BUDGETS['cuda']}; "
        f"{_TOKEN_BUDGETS['cpu']} on the CPU); while nobody decodes, a long prompt may take up to "
        "four times as many on a GPU",
    )
    add(
        "--scheduling-policy",
        choices=PolicyFactory.names(),
        default="fcfs",
        help="order of the waiting queue (default %(default)s)",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the KV blocks of ended requests for those that begin with the same tokens",
    )
    add(
        "--target-itl-ms",
        type=float,
        metavar="MS",
        help="time between two tokens of a stream that chunks of prompts are sized to keep",
    )
    add(
        "--pipeline-depth",
        type=int,
        metavar="N",
        help="steps in flight at a time: 1, or 2 so that a GPU does not wait for the host "
        "(default: 2 on a GPU, 1 on a CPU)",
    )


def add_plan_arguments(parser: argparse.ArgumentParser, gpus: Sequence[str]) -> None:
    """Declare the flags of `octavo plan`; those shared with `octavo serve` mean the same."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder: config and safetensors headers are read")
    device = parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--gpu", choices=gpus, help="a device by name")
    device.add_argument("--gpu-memory", type=float, metavar="GIB", help="a device by its memory")
    add("--dtype", choices=DTYPES, default="auto", help="default: the model's")
    add("--max-model-len", type=int, metavar="TOKENS", help="default: the model's")
    add("--max-num-seqs", type=int, default=256, metavar="N", help="default %(default)s")
    add("--max-num-batched-tokens", type=int, default=_TOKEN_BUDGETS["cuda"], metavar="N")
    add("--block-size", type=int, default=16, metavar="TOKENS", help="default %(default)s")
    add("--gpu-memory-utilization", type=float, default=0.90, metavar="RATIO")
    add("--json", action="store_true", help="print JSON")


def check_plan_arguments(args: argparse.Namespace) -> None:
    """Raise a `ConfigError` for a value that the server would refuse too."""
    _within("gpu-memory", args.gpu_memory, 0.1, 1e6)
    _within("block-size", args.block_size, 1, 256)
    _within("gpu-memory-utilization", args.gpu_memory_utilization, 0.01, 1)
    _within("max-model-len", args.max_model_len, 2, 2**24)
    _within("max-num-seqs", args.max_num_seqs, 1, 65536)
    _within("max-num-batched-tokens", args.max_num_batched_tokens, 1, 2**20)


def reject_unknown(unknown: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Raise a `ConfigError` that names the first unknown flag and the nearest known one."""
    if not unknown:
        return
    flag = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=", 1)[0]
    near = difflib.get_close_matches(flag, parser._option_string_actions, n=1, cutoff=0.5)
    if not flag.startswith("-"):
        raise ConfigError(f"unexpected argument {flag!r} (see {parser.prog} --help)")
    hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} --help"
    raise ConfigError(f"unknown flag {flag}; {hint}")


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """Build and check the configuration from parsed flags and the environment."""
    # Each field has a flag of its name.
    values = {field.name: getattr(args, field.name) for field in fields(EngineConfig)}
    if values["num_threads"] is None:
        values["num_threads"] = cpu_limit()
    engine = EngineConfig(**values)
    config = ServeConfig(
        engine=engine,
        host=args.host,
        port=args.port,
        served_model_names=tuple(args.served_model_name or (_plain_name(engine),)),
        drain_timeout=args.drain_timeout,
        startup_stall_timeout=args.startup_stall_timeout,
        max_queue=args.max_queue,
        chat_template=args.chat_template,
        generation_config=args.generation_config,
        termination_log=termination_log(),
    )
    _validate_engine(engine)
    _validate_serve(config)
    return config


def _json_object(text: str) -> dict[str, Any]:
    """A flag's value that is a JSON object."""
    try:
        value = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object: {error}") from error
    return value


def _plain_name(config: EngineConfig) -> str:
    """What MODEL is called: of a hub's model the name without the revision."""
    return config.model if model_source(config) == "path" else config.model.partition("@")[0]


def model_source(config: EngineConfig) -> str:
    """Where the model really is: path, hub or modelscope."""
    if config.source == "path" or (config.source == "auto" and not _is_hub_name(config.model)):
        return "path"
    if config.source != "auto":
        return config.source
    return "modelscope" if _use_modelscope() else "hub"


def _is_hub_name(model: str) -> bool:
    return looks_like_reference(model) and not Path(model).exists()


def _use_modelscope() -> bool:
    """The seed's switch; vLLM's own name for it counts too."""
    names = ("OCTAVO_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes") for name in names)


def hub_settings(kind: str) -> HubSettings:
    """The hub of that kind (`hub` or `modelscope`), from the variables its own client reads."""
    get = os.environ.get
    caches = Path(get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if kind == "modelscope":
        return HubSettings(
            kind,
            _endpoint(get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"),
            Path(get("MODELSCOPE_CACHE") or caches / "modelscope" / "hub"),
            get("MODELSCOPE_API_TOKEN"),
        )
    home = Path(get("HF_HOME") or caches / "huggingface")
    return HubSettings(
        kind,
        _endpoint(get("HF_ENDPOINT") or "huggingface.co"),
        Path(get("HF_HUB_CACHE") or home / "hub"),
        get("HF_TOKEN") or text_of(home / "token").strip() or None,
        offline=get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes"),
        timeout_s=_seconds("HF_HUB_DOWNLOAD_TIMEOUT", DEFAULT_TIMEOUT_S),
    )


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise ConfigError(f"{name} must be in (0, 3600], got {text[:40]!r}")
    return value


def _endpoint(value: str) -> str:
    return (value if "://" in value else f"https://{value}").rstrip("/")


def parse_serve_args(argv: Sequence[str]) -> ServeConfig:
    """The configuration for the words after `octavo serve`."""
    parser = Parser(prog="octavo serve")
    add_serve_arguments(parser)
    args, unknown = parser.parse_known_args(argv)
    reject_unknown(unknown, parser)
    return serve_config(args)


def _within(flag: str, value: float | None, low: float, high: float) -> None:
    # A comparison with NaN is false, so NaN is refused too.
    if value is not None and not low <= value <= high:
        raise ConfigError(f"--{flag} must be in {low:g}..{high:g}, got {value:g}")


def _one_of(flag: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"--{flag} must be one of {', '.join(allowed)}, got {value!r}")


def _validate_engine(config: EngineConfig) -> None:
    if not config.model:
        raise ConfigError("MODEL is empty; give the path of a model folder")
    _one_of("source", config.source, SOURCES)
    _one_of("device", config.device, DEVICES)
    _one_of("dtype", config.dtype, DTYPES)
    _one_of("load-format", config.load_format, LOAD_FORMATS)
    _one_of("scheduling-policy", config.scheduling_policy, PolicyFactory.names())
    _within("block-size", config.block_size, 1, 256)
    _within("num-kv-blocks", config.num_kv_blocks, 1, 2**31 - 2)
    _within("gpu-memory-utilization", config.gpu_memory_utilization, 0.01, 1)
    _within("swap-space", config.swap_space, 0, 65536)
    _within("max-model-len", config.max_model_len, 2, 2**24)
    _within("max-num-seqs", config.max_num_seqs, 1, 65536)
    _within("max-num-batched-tokens", config.max_num_batched_tokens, 1, 2**20)
    _within("target-itl-ms", config.target_itl_ms, 0.1, 60_000)
    _within("pipeline-depth", config.pipeline_depth, 1, 2)
    _within("seed", config.seed, -(2**63), 2**63 - 1)
    _within("num-threads", config.num_threads, 1, 1024)


def _validate_serve(config: ServeConfig) -> None:
    _within("port", config.port, 0, 65535)
    _within("drain-timeout", config.drain_timeout, 0, 86400)
    _within("startup-stall-timeout", config.startup_stall_timeout, 1, 86400)
    _within("max-queue", config.max_queue, 1, 2**31 - 1)
    if not all(config.served_model_names):
        raise ConfigError("--served-model-name holds an empty name")


def termination_log() -> str:
    """The file whose text Kubernetes shows for an ended container."""
    return os.environ.get("OCTAVO_TERMINATION_LOG", DEFAULT_TERMINATION_LOG)


def cache_folder() -> Path | None:
    """Where what was measured on this machine is kept for the next start: OCTAVO_CACHE, nowhere if
    that is empty, else the user's cache. Nothing is lost with it but seconds.
    """
    asked = os.environ.get("OCTAVO_CACHE")
    if asked is not None:
        return Path(asked) if asked else None
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(caches or Path.home() / ".cache") / "octavo"
    except RuntimeError:  # a user without a home
        return None


def keep_tokenizer_single_threaded() -> None:
    """Unless the user says otherwise: texts come one at a time, and a pool as large as the machine
    would only take turns with the engine. Works at any time.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def limit_threads(num_threads: int) -> None:
    """Bound the numeric libraries' threads; works only before they are imported.

    Left alone they start one thread for each core of the node, which inside a container with a
    smaller CPU limit is throttled instead of faster.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(num_threads)
    # Where other processes want the same cores, a thread that spins while it waits for its mates
    # keeps them from running: steps then take tens of times longer.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def default_threads() -> int:
    """CPU threads where nobody said: OMP_NUM_THREADS if it is set, else the CPU limit."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else cpu_limit()


if sys.platform != "linux":  # pragma: no cover
    raise ConfigError("octavo runs on Linux only")
