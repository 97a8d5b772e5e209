"""The verbs of the cluster tool. Progress goes to standard error, results to standard output.

CLUSTER=current or CLUSTER=kind in the environment turn up, down, status, kubeconfig and images to
a cluster that is not ours. OCTAVO_STEPS names a file that gets each step's seconds as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from e2e.cluster import binaries, cluster, controlplane, doctor, images
from e2e.cluster.errors import ClusterError
from e2e.cluster.external import External, chosen

MIN_PYTHON = (3, 11)


def _binaries(args: argparse.Namespace) -> None:
    binaries.build(args.names or None)


def _binary(args: argparse.Namespace) -> None:
    print(binaries.path(args.name))


def _doctor(args: argparse.Namespace) -> None:
    sentences = doctor.refusals()
    print("\n".join(sentences) or "this machine can be a node")
    if sentences:
        sys.exit(1)


def _elsewhere() -> External | None:
    """The cluster that CLUSTER names when it is not ours."""
    kind = chosen()
    return None if kind == "own" else External(kind)


def _up(args: argparse.Namespace) -> None:
    other = _elsewhere()
    if other:
        other.up()
    else:
        cluster.up(take_over=args.take_over)
    _kubeconfig(args)


def _down(args: argparse.Namespace) -> None:
    other = _elsewhere()
    if other:
        other.down()
    else:
        cluster.down(purge=args.purge)


def _status(args: argparse.Namespace) -> None:
    other = _elsewhere()
    sys.exit(0 if (other.answers() if other else cluster.status()) else 1)


def _kubeconfig(args: argparse.Namespace) -> None:
    other = _elsewhere()
    print(other.kubeconfig() if other else cluster.kubeconfig())


def _fake_gpus(args: argparse.Namespace) -> None:
    cluster.fake_gpus(args.count)


def _images(args: argparse.Namespace) -> None:
    other, targets = _elsewhere(), images.checked_targets(args.targets)
    if args.recorded:
        references = other.references() if other else images.recorded()
        missing = set(targets) - set(references)
        if missing:
            raise ClusterError(f"no image of {', '.join(sorted(missing))} yet: run `images` first")
    else:
        references = other.images(targets) if other else images.build_and_push(targets)
    print(json.dumps(references, indent=1))


def _prune(args: argparse.Namespace) -> None:
    binaries.forget_old()
    images.forget_builds()


def _control_plane(args: argparse.Namespace) -> None:
    plane = controlplane.standalone(args.state)
    if args.action == "up":
        binaries.build(["etcd", "kube-apiserver", "kubectl"])
        plane.up()
        print(plane.state.kubeconfig)
    else:
        plane.down(purge=args.purge)


def parser() -> argparse.ArgumentParser:
    """One sub-command for each verb."""
    top = argparse.ArgumentParser(prog="cluster", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("doctor", help="name what this machine lacks, and how to get it")
    verb.set_defaults(act=_doctor)

    verb = verbs.add_parser("up", help="bring the cluster up; again: start what does not run")
    verb.add_argument("--take-over", action="store_true", help="even another checkout's")
    verb.set_defaults(act=_up)

    verb = verbs.add_parser("down", help="end everything that `up` made; the state stays")
    verb.add_argument("--purge", action="store_true", help="remove the state too")
    verb.set_defaults(act=_down)

    verb = verbs.add_parser("status", help="what runs; exit 0 when the node is Ready")
    verb.set_defaults(act=_status)

    verb = verbs.add_parser("kubeconfig", help="print the kubeconfig's path")
    verb.set_defaults(act=_kubeconfig)

    verb = verbs.add_parser("fake-gpus", help="announce nvidia.com/gpu that is not there")
    verb.add_argument("count", type=int)
    verb.set_defaults(act=_fake_gpus)

    verb = verbs.add_parser("images", help="build, push and pull the images; prints their names")
    verb.add_argument("targets", nargs="*", help="server, operator; both by default")
    verb.add_argument("--recorded", action="store_true", help="only print the last ones' names")
    verb.set_defaults(act=_images)

    verb = verbs.add_parser("prune", help="free the cache: image builds, binaries of former pins")
    verb.set_defaults(act=_prune)

    verb = verbs.add_parser("binaries", help="build what is missing from the pinned Go modules")
    verb.add_argument("names", nargs="*", help="only the modules of these binaries")
    verb.set_defaults(act=_binaries)

    verb = verbs.add_parser("binary", help="print the path of a built binary")
    verb.add_argument("name")
    verb.set_defaults(act=_binary)

    verb = verbs.add_parser("control-plane", help="etcd and kube-apiserver alone, for tests")
    verb.add_argument("action", choices=["up", "down"])
    verb.add_argument("--state", type=Path, required=True, help="its folder")
    verb.add_argument("--purge", action="store_true", help="down: remove the folder too")
    verb.set_defaults(act=_control_plane)
    return top


def main() -> int:
    """Exit 0 when the verb did what it says; 1 with a sentence when not."""
    if sys.version_info < MIN_PYTHON:
        print("Python 3.11 or newer is needed: `apt-get install python3`", file=sys.stderr)
        return 1
    # Root's programs are not on everybody's PATH, not even on root's after `su`.
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    args = parser().parse_args()
    try:
        args.act(args)
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cluster: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0
