"""lm-eval's results, decoded: lines of its table, and each sample's scores. Pure."""

from phi4ray.protocol import Json
from phi4ray.train.scores import Score


def scores_of(results: Json) -> list[Score]:
    """lm-eval's results as the lines of its table."""
    found = []
    for task, values in results["results"].items():
        better = results.get("higher_is_better", {}).get(task, {})
        for key in sorted(values):
            metric, comma, name = key.partition(",")
            value = values[key]
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{name}")
            found.append(
                Score(
                    task=str(values.get("alias", task)),
                    version=str(results["versions"].get(task, "")),
                    filter=name,
                    n_shot=str(results["n-shot"].get(task, "")),
                    metric=metric,
                    higher_is_better=better.get(metric),
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                )
            )
    return found


def samples_of(results: Json, task: str) -> tuple[dict[str, dict[str, float]], dict[str, bool]]:
    """Scores of each document of a task or of a group's tasks, by `task,metric,filter`.

    The second tells of each whether higher is better. Metrics of several numbers are left out.
    """
    found: dict[str, dict[str, float]] = {}
    better: dict[str, bool] = {}
    for leaf in _leaves(results, task):
        for sample in results["samples"].get(leaf, ()):
            for metric in sample["metrics"]:
                value = sample[metric]
                if not isinstance(value, int | float):
                    continue
                key = f"{task},{metric},{sample['filter']}"
                found.setdefault(key, {})[f"{leaf}#{sample['doc_id']}"] = float(value)
                better[key] = results["higher_is_better"].get(leaf, {}).get(metric) is not False
    return found, better


def _leaves(results: Json, task: str) -> list[str]:
    below = results.get("group_subtasks", {}).get(task) or ()
    return [leaf for member in below for leaf in _leaves(results, member)] or [task]
