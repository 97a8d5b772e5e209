"""The offline class on the tiny model: transformers' tokens, vLLM's names, errors by index."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import msgspec
import pytest
import torch
from gpu import ENGINE
from transformers import AutoModelForCausalLM, AutoTokenizer

import octavo
from octavo import LLM, BeamSearchParams, SamplingParams
from octavo.engine.loop import RunnerError
from octavo.errors import ConfigError, ModelError
from octavo.kv_layout import KvGroups
from octavo.kv_stats import KvMeter
from octavo.llm_inputs import PromptError

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "e2e/tinymodel/model"
QUESTIONS = ("What is 12 + 7?", "Count from 5 to 30.", "Spell the word house.", "Who are you?")
GREEDY = SamplingParams(temperature=0, max_tokens=48)

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the tiny model is not there")


@cache
def oracle():
    torch.set_num_threads(1)
    return AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32
    )


@cache
def expected(question):
    """transformers' prompt ids, greedy ids and their text."""
    tokenizer, model = oracle()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48
        )[0, len(prompt) :].tolist()
    return prompt, output, tokenizer.decode(output, skip_special_tokens=True)


@cache
def llm():
    return LLM(str(MODEL), num_kv_blocks=96, max_num_seqs=8, num_threads=1, **ENGINE)


def run(prompts, params=GREEDY, **options):
    return llm().generate(prompts, params, use_tqdm=False, **options)


@pytest.fixture(autouse=True)
def _nothing_stays_behind():
    yield
    loop = llm()._loop
    assert not loop.has_work
    loop.scheduler.check_integrity()
    assert llm().kv_stats().active == 0


def check_output(output, question):
    prompt, ids, text = expected(question)
    assert output.prompt_token_ids == prompt
    assert output.finished
    (choice,) = output.outputs
    assert (choice.index, choice.token_ids, choice.text) == (0, ids, text)
    assert choice.finish_reason == ("length" if len(ids) == 48 else "stop")
    assert choice.stop_reason is None
    assert choice.finished()


def test_only_the_end_of_all_matters():
    assert llm()._loop.scheduler.limits.offline


def test_chat_answers_as_transformers_does():
    conversations = [[{"role": "user", "content": q}] for q in QUESTIONS]
    outputs = llm().chat(conversations, GREEDY, use_tqdm=False)
    for question, output in zip(QUESTIONS, outputs, strict=True):
        check_output(output, question)
    (alone,) = llm().chat(conversations[1], GREEDY, use_tqdm=False)
    check_output(alone, QUESTIONS[1])
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]}]
    check_output(llm().chat(parts, GREEDY, use_tqdm=False)[0], QUESTIONS[0])


def test_every_form_of_a_prompt_gives_the_same_tokens():
    question = QUESTIONS[0]
    prompt, ids, _ = expected(question)
    text = oracle()[0].decode(prompt[1:])  # a text gets the first token by itself
    assert llm().get_tokenizer().encode(text) == prompt
    forms = [text, prompt, {"prompt": text}, {"prompt_token_ids": prompt}]
    for form in forms:
        (output,) = run(form)
        check_output(output, question)
    assert [o.outputs[0].token_ids for o in run(forms)] == [ids] * 4
    assert run([text])[0].prompt == text
    assert run(prompt)[0].prompt is None
    assert run([]) == []


def test_results_are_in_the_order_of_the_prompts_with_parameters_of_their_own():
    prompts = [expected(q)[0] for q in QUESTIONS] * 3
    params = [SamplingParams(temperature=0, max_tokens=1 + i) for i in range(len(prompts))]
    outputs = run(prompts, params, priority=list(range(len(prompts))))
    for i, output in enumerate(outputs):
        assert output.prompt_token_ids == prompts[i]
        assert output.outputs[0].token_ids == expected(QUESTIONS[i % 4])[1][: 1 + i]
    ids = [output.request_id for output in outputs]
    assert len(set(ids)) == len(ids)


def test_without_parameters_the_answer_is_short_as_vllm_s():
    torch.manual_seed(0)
    (output,) = llm().generate(expected(QUESTIONS[1])[0], use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 16


def test_stop_strings_cut_the_text_and_end_the_request():
    prompt, ids, text = expected(QUESTIONS[1])
    stop = text[10:14]
    (output,) = run(prompt, SamplingParams(temperature=0, max_tokens=48, stop=(stop,)))
    choice = output.outputs[0]
    assert choice.text == text[: text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert choice.token_ids == ids[: len(choice.token_ids)]
    assert len(choice.token_ids) < len(ids)


def test_a_stop_token_id_is_the_reason():
    prompt, ids, _ = expected(QUESTIONS[1])
    (output,) = run(prompt, SamplingParams(temperature=0, stop_token_ids=(ids[5],)))
    choice = output.outputs[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", ids[5])
    assert choice.token_ids == ids[: ids.index(ids[5]) + 1]


def test_times_are_in_order():
    (output,) = run(expected(QUESTIONS[1])[0])
    metrics = output.metrics
    assert 0 < metrics.queued_ts <= metrics.scheduled_ts <= metrics.first_token_ts
    assert metrics.first_token_ts < metrics.last_token_ts
    assert metrics.first_token_latency > 0
    assert metrics.num_generation_tokens == len(output.outputs[0].token_ids)


WRONG = [
    ({"prompt_token_ids": []}, "the prompt has no tokens"),
    ([], "the prompt has no tokens"),
    ([10**9], "token id 1000000000; valid ids are 0.."),
    ([-1], "token id -1"),
    ([5] * 5000, "the prompt has 5000 tokens; at most"),
    ({"prompt": 3}, "needs prompt"),
    ({"prompt_token_ids": ["a"]}, "prompt_token_ids must be a list of integers"),
    ({"prompt": "a", "multi_modal_data": {}}, "'multi_modal_data' is not supported"),
    (3.5, "not a text, token ids or a dict: float"),
    ([True], "not a text"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_a_wrong_prompt_is_named_before_anything_runs(wrong, message):
    steps = llm()._loop.scheduler.counters.steps
    with pytest.raises(PromptError, match=re.escape(message)) as caught:
        run(["fine", "fine too", wrong, "fine again"])
    assert caught.value.index == 2
    assert str(caught.value).startswith("prompts[2]: ")
    assert llm()._loop.scheduler.counters.steps == steps


def test_wrong_parameters_are_named():
    bad = SamplingParams(temperature=-1)
    with pytest.raises(PromptError, match=r"prompts\[1\]: temperature must be a number in"):
        run(["a", "b"], [GREEDY, bad])
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        run(["a", "b"], [GREEDY])
    with pytest.raises(ValueError, match="3 priorities for 2 prompts"):
        run(["a", "b"], priority=[1, 2, 3])
    with pytest.raises(TypeError, match="prompts must be a text"):
        run(3)


def test_a_conversation_that_is_none_is_named():
    with pytest.raises(PromptError, match="a message is a dict with role and content"):
        llm().chat([[{"content": "x"}]])
    with pytest.raises(PromptError, match="a message's content must be a text"):
        llm().chat([{"role": "user", "content": 5}])
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(PromptError, match="only text parts"):
        llm().chat([{"role": "user", "content": picture}])


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ({"max_modl_len": 3}, "no keyword 'max_modl_len'; did you mean max_model_len?"),
        ({"zzz": 1}, "LLM() has no keyword 'zzz'"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(keyword, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        LLM(str(MODEL), **keyword)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported; supported: 1"),
        ({"block_size": "16"}, "Expected `int`, got `str` - at `$.block_size`"),
        ({"block_size": 0}, "--block-size must be in 1..256, got 0"),
        ({"tokenizer_mode": "slow"}, "tokenizer_mode='slow' is not supported"),
        ({"device": object()}, "wrong type"),
        ({"max_logprobs": 21}, "max_logprobs must be in 0..20, got 21"),
    ],
)
def test_a_wrong_value_is_named(keyword, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        LLM(str(MODEL), **keyword)


def test_overrides_take_the_place_of_the_config_s_values():
    overrides = {"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 1.5}}
    plain = LLM(str(MODEL), num_kv_blocks=16, num_threads=1, **ENGINE)
    changed = LLM(str(MODEL), num_kv_blocks=16, num_threads=1, hf_overrides=overrides, **ENGINE)
    prompt, _, _ = expected(QUESTIONS[0])
    (of_plain,) = plain.generate([prompt[:40]], GREEDY, use_tqdm=False)
    (of_changed,) = changed.generate([prompt[:40]], GREEDY, use_tqdm=False)
    assert of_plain.outputs[0].token_ids != of_changed.outputs[0].token_ids
    with pytest.raises(PromptError, match="at most 63 leave room"):
        changed.generate([[5] * 65], GREEDY)
    with pytest.raises(ModelError, match=r"with overrides: num_hidden_layers must be an integer"):
        LLM(str(MODEL), **ENGINE, hf_overrides={"num_hidden_layers": "two"})


def test_without_a_tokenizer_ids_go_in_and_out():
    bare = LLM(
        str(MODEL), num_kv_blocks=16, skip_tokenizer_init=True, num_threads=1, **ENGINE,
        max_logprobs=2,
    )  # fmt: skip
    prompt, ids, _ = expected(QUESTIONS[0])
    (output,) = bare.generate({"prompt_token_ids": prompt}, GREEDY, use_tqdm=False)
    assert (output.outputs[0].token_ids, output.outputs[0].text) == (ids, "")
    with pytest.raises(PromptError, match="logprobs is 3; this LLM was made with max_logprobs=2"):
        bare.generate([prompt], SamplingParams(logprobs=3))
    with pytest.raises(PromptError, match="a text needs the tokenizer"):
        bare.generate("x")
    with pytest.raises(PromptError, match="stop strings and bad words need the tokenizer"):
        bare.generate([prompt], SamplingParams(stop=("x",)))
    with pytest.raises(ConfigError, match="leave skip_tokenizer_init out"):
        bare.chat([{"role": "user", "content": "x"}])


def test_a_failing_runner_ends_the_call_and_frees_the_blocks(monkeypatch):
    loop = llm()._loop
    real, calls = loop._runner.submit, []

    def submit(plan):
        calls.append(plan)
        if len(calls) == 3:
            raise RunnerError("the device is gone")
        return real(plan)

    monkeypatch.setattr(loop._runner, "submit", submit)
    with pytest.raises(RunnerError, match="the device is gone"):
        run([expected(q)[0] for q in QUESTIONS])
    assert not loop.has_work
    check_output(run(expected(QUESTIONS[0])[0])[0], QUESTIONS[0])


def test_an_error_while_running_stays_with_its_prompt(monkeypatch):
    loop = llm()._loop
    real = loop.step

    def step():
        outputs = real()
        return [
            msgspec.structs.replace(o, token_ids=[], finish_reason="error", error="NaN")
            if o.request_id == victim and loop.abort(victim) is None
            else o
            for o in outputs
        ]

    victim = str(int(run("a", SamplingParams(max_tokens=1))[0].request_id) + 2)
    monkeypatch.setattr(loop, "step", step)
    outputs = run([expected(q)[0] for q in QUESTIONS])
    bad = outputs[1].outputs[0]
    assert (bad.finish_reason, bad.stop_reason) == ("error", "NaN")
    for i in (0, 2, 3):
        check_output(outputs[i], QUESTIONS[i])


def test_the_progress_bar_counts_prompts(capsys):
    llm().generate(["a", "b"], SamplingParams(max_tokens=2))
    assert "Processed prompts: 100%" in capsys.readouterr().err
    run(["a", "b"], SamplingParams(max_tokens=2))
    assert capsys.readouterr().err == ""


def test_kv_stats_show_waste_and_return_to_rest():
    run([expected(q)[0] for q in QUESTIONS])
    stats = llm().kv_stats()
    assert stats.total == 96
    assert stats.peak_active >= 4
    assert stats.active + stats.cached + stats.free == stats.total
    assert 0 < stats.waste < 0.5
    assert 0 <= stats.sharing < 1


class Holder:
    def __init__(self, block_table, computed):
        self.block_table = block_table
        self.computed = computed


def test_the_meter_counts_a_shared_block_once():
    meter = KvMeter(KvGroups(4), 1024)
    # Blocks 1 and 2 are shared; 2 is half full; block 4 was given ahead and is empty.
    meter.observe([Holder([1, 2], 6), Holder([1, 2], 6), Holder([3, 4], 4)], active=4)
    stats = meter.stats(llm()._loop.scheduler.pool.counts)
    assert stats.waste == (2 + 4) / 16
    assert stats.sharing == 1 - 4 / 6
    assert stats.peak_active == 4


def test_the_meter_passes_over_what_a_window_has_given_up():
    meter = KvMeter(KvGroups(4, (None, 4)), 1024)
    # Three rows of two groups; of the second's blocks only the last two are left.
    meter.observe([Holder([1, -1, 2, 3, 4, 5], 10)], active=5)
    stats = meter.stats(llm()._loop.scheduler.pool.counts)
    assert stats.waste == 2 * 2 / 20
    assert stats.sharing == 0
    assert stats.block_bytes == 1024


def test_samples_share_their_prompt_and_are_those_of_lone_requests():
    prompt = "a"  # after which the model is unsure
    params = SamplingParams(n=3, temperature=2, seed=11, max_tokens=12)
    (output,) = run(prompt, params)
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in output.outputs}) > 1
    assert all(choice.finished() for choice in output.outputs)
    again = run([prompt, prompt], params)
    for other in again:
        assert [c.token_ids for c in other.outputs] == [c.token_ids for c in output.outputs]
        assert [c.text for c in other.outputs] == [c.text for c in output.outputs]
    total = sum(len(choice.token_ids) for choice in output.outputs)
    assert output.metrics.num_generation_tokens == total


def test_the_best_of_several_are_the_most_probable():
    prompt = "a"  # after which the model is unsure
    every = {"temperature": 2, "seed": 3, "max_tokens": 6}
    (whole,) = run(prompt, SamplingParams(n=4, logprobs=0, **every))
    (best,) = run(prompt, SamplingParams(n=2, best_of=4, **every))
    ranked = sorted(whole.outputs, key=lambda choice: -choice.cumulative_logprob)
    assert [c.token_ids for c in best.outputs] == [c.token_ids for c in ranked[:2]]
    assert [c.index for c in best.outputs] == [0, 1]
    assert all(c.logprobs is None and c.cumulative_logprob < 0 for c in best.outputs)


def test_a_stop_string_ends_one_sample_alone():
    prompt = "a"
    every = {"n": 3, "temperature": 2, "seed": 5, "max_tokens": 16}
    (free,) = run(prompt, SamplingParams(**every))
    stop = free.outputs[0].text[3:6]
    (output,) = run(prompt, SamplingParams(stop=stop, **every))
    for before, after in zip(free.outputs, output.outputs, strict=True):
        assert after.text == before.text.partition(stop)[0]
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
    assert output.outputs[0].stop_reason == stop


@pytest.mark.parametrize(("width", "penalty", "early"), [(2, 1.0, False), (4, 0.5, True)])
def test_a_beam_search_is_transformers(width, penalty, early):
    tokenizer, model = oracle()
    prompts = [expected(q)[0] for q in QUESTIONS]
    params = BeamSearchParams(
        beam_width=width, max_tokens=20, length_penalty=penalty, early_stopping=early
    )
    found = llm().beam_search(prompts, params)
    for prompt, output in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            theirs = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20,
                num_beams=width, num_return_sequences=width, length_penalty=penalty,
                early_stopping=early, return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        pad = tokenizer.pad_token_id
        for ours, row, score in zip(
            output.sequences, theirs.sequences.tolist(), theirs.sequences_scores, strict=True
        ):
            assert [t for t in ours.tokens if t != pad] == [t for t in row if t != pad]
            assert ours.cum_logprob == pytest.approx(score.item(), abs=1e-4)
            assert ours.text == tokenizer.decode(row[len(prompt) :], skip_special_tokens=True)
    with pytest.raises(ValueError, match="a beam search draws nothing"):
        llm().beam_search("x", BeamSearchParams(beam_width=2, max_tokens=2, temperature=1.0))


def test_importing_octavo_brings_no_torch():
    code = (
        "import sys, octavo; print('torch' in sys.modules); from octavo import SamplingParams; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="no attribute 'LLMM'"):
        octavo.LLMM  # noqa: B018  the access is the test


def test_the_readme_s_snippet_runs():
    text = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(from octavo import LLM.*?)```", text, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "42"


def test_logprobs_are_those_of_transformers():
    prompt, ids, _ = expected(QUESTIONS[0])
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2)
    (output,) = run(prompt, params)
    _, model = oracle()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids[:4]])).logits[0]
    theirs = torch.log_softmax(logits.float(), -1)
    choice = output.outputs[0]
    count = len(choice.token_ids)
    assert len(choice.logprobs) == count
    for place, (token_id, found) in enumerate(zip(choice.token_ids, choice.logprobs, strict=True)):
        row = theirs[len(prompt) - 1 + place]
        assert set(found) == {*row.topk(3).indices.tolist(), token_id}
        for i, entry in found.items():
            assert entry.logprob == pytest.approx(row[i].item(), abs=1e-4)
        assert found[token_id].rank == 1
        assert found[token_id].decoded_token == llm().get_tokenizer().token_text(token_id)
    total = sum(f[t].logprob for t, f in zip(choice.token_ids, choice.logprobs, strict=True))
    assert choice.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for place in range(1, len(prompt)):
        row = theirs[place - 1]
        assert output.prompt_logprobs[place][prompt[place]].logprob == pytest.approx(
            row[prompt[place]].item(), abs=1e-4
        )


def test_the_stop_string_can_stay_in_the_text():
    prompt, _, text = expected(QUESTIONS[1])
    stop = text[10:14]
    params = SamplingParams(
        temperature=0, max_tokens=48, stop=[stop], include_stop_str_in_output=True
    )
    assert run(prompt, params)[0].outputs[0].text == text[: text.index(stop) + len(stop)]


def test_control_tokens_are_text_when_asked():
    ids = {"prompt_token_ids": expected("Who are you?")[0]}
    params = SamplingParams(
        temperature=0, max_tokens=4, ignore_eos=True, allowed_token_ids=[3], logprobs=0
    )
    shown = msgspec.structs.replace(params, skip_special_tokens=False)
    assert run(ids, params)[0].outputs[0].text == ""
    result = run(ids, shown)[0].outputs[0]
    assert result.text == "<|im_end|>" * 4
    assert [e[3].decoded_token for e in result.logprobs] == ["<|im_end|>"] * 4
