"""A saved view of the MLflow UI: the sweep's runs grouped into lines, the charts that matter first.

The UI keeps shared views as experiment tags in a format of its own. It is no public interface, so
it is written only for the MLflow version that it was read from (3.17: ExperimentPageUIState and
RunsChartsLineCardConfig in its front end); other versions get the plain chart page.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KNOWN_VERSION = "3.17."
TAG_PREFIX = "mlflow.sharedViewState."
SECTIONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Which fleet wins, at what load",
        (
            ("output_throughput", "Output tokens per second, by users"),
            ("usd_per_mtok_output", "US$ per million output tokens, by users"),
            ("p99_ttft_ms", "TTFT p99, ms, by users"),
            ("median_ttft_ms", "TTFT median, ms, by users"),
            ("median_tpot_ms", "TPOT median, ms, by users"),
            ("p99_tpot_ms", "TPOT p99, ms, by users"),
            ("median_e2el_ms", "E2E median, ms, by users"),
            ("p99_e2el_ms", "E2E p99, ms, by users"),
        ),
    ),
    (
        "Why",
        (
            ("goodput_share", "Share of requests within the objective, by users"),
            ("median_gateway_ms", "Gateway overhead median, ms, by users"),
            ("load_imbalance", "Busiest expert over mean, by users"),
            ("preemptions", "Preemptions, by users"),
        ),
    ),
)


def view_key(sweep_id: str) -> str | None:
    """The key under which the sweep's view is saved; None for an MLflow version that is not known."""
    if not version("mlflow").startswith(KNOWN_VERSION):
        return None
    return hashlib.sha256(sweep_id.encode()).hexdigest()[:16]


def save_view(
    client: MlflowClient, experiment_id: str, sweep_id: str, sweep_tag: str, lines: Sequence[str]
) -> None:
    """Save the sweep's view as an experiment tag; nothing for an MLflow version that is not known."""
    key = view_key(sweep_id)
    if key is not None:
        state = json.dumps(view_state(sweep_id, sweep_tag, lines), separators=(",", ":"))
        client.set_experiment_tag(experiment_id, TAG_PREFIX + key, state)


def view_state(sweep_id: str, sweep_tag: str, lines: Sequence[str]) -> dict[str, Any]:
    """The view: jobs of one sweep (not the parent), averaged over seeds into one line per `line` param."""
    charts: list[dict[str, Any]] = []
    sections: list[dict[str, Any]] = []
    for name, members in SECTIONS:
        section = _identifier(sweep_id, name)
        sections.append(
            {
                "uuid": section,
                "name": name,
                "display": True,
                "isReordered": True,
                "deleted": False,
                "isGenerated": False,
            }
        )
        charts += [
            _chart(_identifier(sweep_id, name, metric), section, metric, title) for metric, title in members
        ]
    return {
        "searchFilter": f"tags.`{sweep_tag}` = '{sweep_id}' and params.line != ''",
        "orderByKey": "params.`users`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "param", "groupByData": "line"}],
        },
        "groupsExpanded": {f"param.line.{line}": False for line in lines},
        "useGroupedValuesInCharts": True,
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,
        "runsHiddenMode": "SHOW_ALL",
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsPinned": [],
        "runsExpanded": {},
        "selectedColumns": ["params.`users`", "params.`gpus`", "metrics.`output_throughput`"],
        "columnOrder": [],
        "columnWidths": {},
        "viewMaximized": False,
        "runListHidden": False,
        "autoRefreshEnabled": False,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _chart(identifier: str, section: str, metric: str, title: str) -> dict[str, Any]:
    """A line chart of `metric` against step (= users), both axes logarithmic where that helps."""
    return {
        "uuid": identifier,
        "type": "LINE",
        "runsCountToCompare": 20,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        "displayName": title,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "xAxisScaleType": "log",
        "scaleType": "linear" if metric in ("goodput_share", "preemptions", "load_imbalance") else "log",
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "displayPoints": True,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
        "range": {},
    }


def _identifier(*parts: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(parts)))
