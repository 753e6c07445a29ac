"""The benchmark that holds the plan against the stream: what it makes, and that its numbers are of the right things."""

from pathlib import Path

import plan_check
import pytest

from mellow_ds.packing.planning.plan import corpus_of_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    options = plan_check.parse_arguments(["--tiny", "--codecs", "pcm", "--seed", "3"])
    return plan_check.build_corpus(tmp_path_factory.mktemp("plan"), options)


def test_the_corpus_is_what_the_plan_is_asked_about(folders: dict[str, Path]) -> None:
    assert set(folders) == {"pcm", plan_check.TEXTS}
    size, codec = corpus_of_folder(folders["pcm"])
    assert codec == "pcm"
    assert (size.num_clips, size.questions_per_clip) == (16, 5)
    assert size.mean_seconds == pytest.approx(0.5)
    assert size.clips_per_question == pytest.approx(1.2, abs=0.05)
    assert size.num_shards > 1
    assert corpus_of_folder(folders[plan_check.TEXTS])[0].mean_seconds == pytest.approx(0.01)


def test_a_child_measures_the_stream_and_the_bare_loop(folders: dict[str, Path]) -> None:
    found = plan_check.measure_child(folders["pcm"], 0, 4, 0.1)
    assert found["examples_per_second"] > 0
    assert found["first_batch_seconds"] > 0
    cost = plan_check.measure_child(folders["pcm"], -1, 4, 0.1)["cpu_seconds"]
    assert 0 < cost < 1


def test_predictions_scale_with_loader_processes(folders: dict[str, Path]) -> None:
    one, two = (plan_check.predict(folders["pcm"], "pcm", workers, 4, 100.0) for workers in (1, 2))
    assert 50 < one["examples_per_second"] < 100  # the way to the trainer comes on top
    assert two["examples_per_second"] == pytest.approx(2 * one["examples_per_second"])
    alone = plan_check.predict(folders["pcm"], "pcm", 0, 4, 100.0)
    assert alone["examples_per_second"] == pytest.approx(100)
    assert alone["first_batch_seconds"] < one["first_batch_seconds"]
