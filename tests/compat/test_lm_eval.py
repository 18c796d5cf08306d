"""Contract tests of lm-evaluation-harness for flash.compat.lm_eval."""

import json
import logging

import pytest
import yaml

from tests.compat.contract import contract

QUESTIONS = [{"question": "1 + 1", "choices": ["2", "33"], "label": 0}] * 3


@pytest.fixture
def folder(tmp_path):
    """Folder with the YAML file of one task; the data that it names do not exist."""
    task = {
        "task": "contract",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "none.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "shown",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} =",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "contract.yaml").write_text(yaml.safe_dump(task), "utf-8")
    rows = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (tmp_path / "data.jsonl").write_text(rows, "utf-8")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return tmp_path


def make_model():
    """Make a model whose tokens are characters, and whose shorter continuations are likelier."""
    from flash.compat.lm_eval import TokenScoringLM

    class Characters(TokenScoringLM):
        seen: list = []
        eot_token_id = 0
        tokenizer_name = "characters"

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return list(map(ord, string))

        def score_pairs(self, pairs):
            self.seen += pairs
            return [(-float(len(continuation)), True) for _, continuation in pairs]

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError

        def generate_until(self, requests, disable_tqdm=False):
            raise NotImplementedError

    return Characters()


def test_log_likelihoods_are_requested_by_tokens():
    with contract(
        "lm_eval's TemplateLM._loglikelihood_tokens",
        "flash.compat.lm_eval.TokenScoringLM",
        "score continuations",
    ):
        from lm_eval.api.instance import Instance

        model = make_model()
        request = Instance("loglikelihood", {}, ("ab ", "cd"), 0)
        assert model.loglikelihood([request], disable_tqdm=True) == [(-3.0, True)]
        assert model.seen == [(list(b"ab"), list(b" cd"))]


def test_windows_score_each_token_once():
    with contract(
        "lm_eval.utils.get_rolling_token_windows or make_disjoint_window",
        "flash.compat.lm_eval.rolling_windows",
        "score long texts as the harness does",
    ):
        from flash.compat.lm_eval import rolling_windows

        windows = list(rolling_windows([1, 2, 3, 4, 5], 0, 3))
        assert windows == [([0], [1, 2, 3]), ([2, 3], [4, 5])]


def test_settings_of_answers_get_defaults():
    with contract(
        "lm_eval.models.utils.normalize_gen_kwargs",
        "flash.compat.lm_eval.generation_settings",
        "know when an answer ends",
    ):
        from flash.compat.lm_eval import generation_settings

        found = generation_settings({"until": "x"}, 7)
        assert (found["until"], found["max_gen_toks"], found["do_sample"]) == (["x"], 7, False)
        assert generation_settings({"max_new_tokens": 3}, 7)["max_gen_toks"] == 3


@pytest.mark.parametrize("shots", [None, 1])
def test_a_task_is_indexed_changed_loaded_and_evaluated(folder, shots):
    with contract(
        "lm_eval's TaskManager, its tasks or what evaluate returns",
        "flash.compat.lm_eval and flash.evaluation.tasks",
        "run benchmarks on data files of the user",
    ):
        from lm_eval.evaluator import evaluate

        from flash.compat.lm_eval import (
            fewshot_of,
            index_tasks,
            is_lower_better,
            load_task,
            metric_keys,
            no_bars,
            seed_fewshot,
            set_fewshot,
            task_config,
        )

        manager = index_tasks([folder], {"contract"})
        assert "contract" in manager.all_tasks
        assert len(manager.all_tasks) < 100  # without the tasks of the harness
        assert task_config(manager, "contract")["dataset_path"] == "json"
        loaded = load_task(
            manager, "contract", {split: str(folder / "data.jsonl") for split in ("test", "shown")}
        )
        set_fewshot(loaded, shots)
        seed_fewshot(loaded, 1)
        assert metric_keys(loaded, "contract") == {"acc,none"}
        assert metric_keys(loaded, "another") == set()
        assert not is_lower_better(loaded, "acc,none")
        assert fewshot_of(loaded) == (shots or 0)
        with no_bars():
            found = evaluate(
                lm=make_model(), task_dict=loaded, bootstrap_iters=2, log_samples=False
            )
        assert found is not None
        assert found["results"]["contract"]["acc,none"] == 1.0
        assert found["n-samples"]["contract"]["effective"] == 3
