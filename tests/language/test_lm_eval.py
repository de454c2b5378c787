"""lm-evaluation-harness itself on a small task made here; skipped where the package is not installed."""

import json
import math

import pytest

lm_eval = pytest.importorskip("lm_eval")

import zoo  # noqa: E402
from zoo_language.lm_eval_adapter import ZooLM  # noqa: E402
from zoo_language.scoring import continuation_loglikelihood, score  # noqa: E402

QUESTIONS = [
    {"query": "In the beginning God created the", "choices": ["heaven", "computer", "zzzzzz"], "gold": 0},
    {"query": "And the LORD spake unto", "choices": ["xqxqxq", "Moses", "internet"], "gold": 1},
    {"query": "And he went out from the presence of the", "choices": ["qwerty", "vvvv", "LORD"], "gold": 2},
]
TASKS = {
    "bible_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_target": "gold",
        "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}],
    },
    "bible_perplexity": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{query}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "bible_go_on": {
        "output_type": "generate_until", "doc_to_text": "{{query}}", "doc_to_target": "x",
        "generation_kwargs": {"until": [" "], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.json"
    data.write_text("\n".join(json.dumps(q) for q in QUESTIONS))
    tasks = [
        {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
         "test_split": "test", **task}
        for name, task in TASKS.items()
    ]  # fmt: skip
    return lm_eval.simple_evaluate(model=ZooLM("mamba2_micro"), tasks=tasks, bootstrap_iters=0)


def test_multiple_choice(results):
    assert results["results"]["bible_choice"]["acc,none"] == 1.0


def test_rolling(results):
    model = zoo.load("mamba2_micro")
    texts = [q["query"].encode() for q in QUESTIONS]
    nats = sum(score(model, list(t), text_bytes=len(t), start=10).nats for t in texts)
    expected = nats / math.log(2) / sum(map(len, texts))
    assert results["results"]["bible_perplexity"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def test_generation(results):
    for sample in results["samples"]["bible_go_on"]:
        answer = sample["resps"][0][0]
        assert " " not in answer
        assert len(answer) <= 6


def test_continuations_are_scored_alike(results):
    model = zoo.load("mamba2_micro")
    for sample in results["samples"]["bible_choice"]:
        for choice, (value, greedy) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            context, continuation = list(sample["doc"]["query"].encode()), list(f" {choice}".encode())
            want, is_greedy = continuation_loglikelihood(model, context, continuation)
            assert float(value) == pytest.approx(want, rel=1e-4)
            assert str(greedy) == str(is_greedy)
