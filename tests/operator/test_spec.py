"""The typed view has what the object has, and names a field that should be there and is not."""

import llmservices
import pytest

from octavo_operator.spec import SpecError, camel, parse


def test_defaults_of_the_schema_arrive() -> None:
    spec = llmservices.service().spec
    assert (spec.engine.block_size, spec.engine.device, spec.engine.dtype) == (16, "auto", "auto")
    assert spec.engine.extra_args == ()
    assert spec.autoscaling is None
    assert spec.replicas is None
    assert spec.fixed_replicas == 1
    assert spec.termination_grace_period_seconds == 120


def test_nested_defaults_arrive() -> None:
    policy = llmservices.service({"autoscaling": {"max": 3}}).spec.autoscaling
    assert policy is not None
    assert (policy.min, policy.max, policy.targets.kv_utilization) == (1, 3, 0.8)
    assert (policy.up.window_seconds, policy.up.max_pods, policy.up.period_seconds) == (0, 4, 15)
    assert (policy.down.window_seconds, policy.down.max_pods) == (300, 1)


def test_lists_of_objects_become_tuples_of_views() -> None:
    spec = llmservices.service(
        {
            "engine": {"env": [{"name": "A", "value": "1"}]},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
        }
    ).spec
    assert [(v.name, v.value) for v in spec.engine.env] == [("A", "1")]
    assert spec.tolerations[0].key == "gpu"
    assert spec.tolerations[0].toleration_seconds is None


@pytest.mark.parametrize(
    ("device", "accelerator", "wanted"),
    [
        ("auto", None, 1),
        ("auto", {"count": 0}, 0),
        ("cuda", None, 1),
        ("cuda", {"count": 1}, 1),
        ("cpu", None, 0),
        ("cpu", {"count": 0}, 0),
    ],
)
def test_accelerator_unless_the_device_is_cpu(
    device: str, accelerator: dict[str, int] | None, wanted: int
) -> None:
    given = {"accelerator": accelerator} if accelerator else {}
    found = llmservices.service({"engine": {"device": device}, **given}).spec.wanted_accelerator
    assert (found.count if found else 0) == wanted


def test_a_missing_field_is_named() -> None:
    body = llmservices.body()
    del body["spec"]["engine"]["blockSize"]
    with pytest.raises(SpecError, match=r"spec\.engine\.blockSize is missing.*CRD"):
        parse(body)


def test_unknown_fields_of_a_newer_schema_are_ignored() -> None:
    body = llmservices.body()
    body["spec"]["engine"]["fromTheFuture"] = 1
    assert parse(body).spec.engine.block_size == 16


def test_camel() -> None:
    assert camel("max_model_len") == "maxModelLen"
    assert camel("uri") == "uri"
