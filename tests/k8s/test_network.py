"""Who may talk to whom: a table, and what the rendered policies let pass is exactly this table.

A connection passes if the policies that select its source let it out and those that select its target let it in; a pod
that no policy of a direction selects is open in that direction.
"""

from itertools import product
from typing import Any, NamedTuple

import pytest

from tests.k8s.rendering import Object
from tests.k8s.test_manifests import RENDERED, template_of


class Place(NamedTuple):
    """One end of a connection; no namespace: outside the cluster, or a node."""

    name: str
    labels: dict[str, str]
    namespace: str = ""


class Flow(NamedTuple):
    source: str
    target: str
    protocol: str
    ports: tuple[int, ...]


ANY = (22, 53, 443, 5000, 5432, 6443, 8080, 8265, 8333, 8887, 8888, 9000, 29500, 41234)
"""All ports that anyone listens on here, and some that nobody does."""

OUTSIDE = ("anywhere", "neighbour", "name server", "pipelines", "ray operator")
"""Not ours: another machine, a pod in our namespace, one of kube-system, one of Kubeflow's, KubeRay's operator."""

FLOWS = [
    Flow("worker", "worker", "TCP", ANY),
    Flow("ray", "ray", "TCP", ANY),
    Flow("ray operator", "ray", "TCP", (8265,)),
    Flow("step", "mlflow", "TCP", (5000,)),
    Flow("serving", "mlflow", "TCP", (5000,)),
    Flow("mlflow", "postgres", "TCP", (5432,)),
    *(Flow(source, "serving", "TCP", (8080,)) for source in OUTSIDE),
    # Outwards a rule names a port only: name servers, the API server (443, or 6443 behind its Service), a webhook, a
    # database and a store are nobody's pods, or differently labelled ones in every cluster.
    *(Flow(source, "outside", "UDP", (53,)) for source in ("worker", "step", "mlflow", "serving", "ray")),
    *(Flow(source, "outside", "TCP", (53,)) for source in ("worker", "step", "mlflow", "serving", "ray")),
    Flow("step", "outside", "TCP", (443, 6443)),
    Flow("step", "pipelines", "TCP", (8080, 8333, 8887, 8888, 9000)),
    Flow("mlflow", "outside", "TCP", (5432,)),
]

STORE = [Flow(source, "outside", "TCP", (443,)) for source in ("worker", "serving", "ray")]
"""Where storage.root is s3://: steps reach it as they reach the API server."""

COMPONENTS = {
    "kind": ("worker", "step", "mlflow", "serving"),
    "production": ("worker", "step", "mlflow", "serving", "ray"),
    "kubeflow": ("worker", "step", "mlflow", "serving", "ray"),
    "postgres": ("worker", "step", "mlflow", "serving", "ray", "postgres"),
}


@pytest.mark.parametrize("overlay", COMPONENTS)
def test_listed_flows_pass_and_no_other(overlay: str) -> None:
    flows = FLOWS + (STORE if overlay != "kind" else [])
    listed = {
        (flow.source, target, flow.protocol, port)
        for flow in flows
        for target in (OUTSIDE if flow.target == "outside" else (flow.target,))
        for port in flow.ports
    }
    if overlay == "kubeflow":
        # There our neighbours are Kubeflow's.
        listed |= {("step", "neighbour", "TCP", port) for port in (8080, 8333, 8887, 8888, 9000)}
    places = _places(overlay)
    for source, target in product(places, places):
        if source.name in OUTSIDE and target.name in OUTSIDE:
            continue
        for protocol, port in product(("TCP", "UDP"), ANY):
            flow = (source.name, target.name, protocol, port)
            assert passes(RENDERED[overlay], source, target, protocol, port) == (flow in listed), flow


def test_only_our_own_pods_are_selected() -> None:
    """A policy for a whole namespace would cut off whoever else lives there."""
    for objects in RENDERED.values():
        for policy in _policies(objects):
            assert policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/part-of"] == "des"


def _places(overlay: str) -> list[Place]:
    space = "kubeflow" if overlay == "kubeflow" else "des"
    labels = [template["metadata"]["labels"] for one in RENDERED[overlay] if (template := template_of(one))]
    ours = {label["app.kubernetes.io/component"]: label for label in labels}
    # Under Kubeflow steps are its pods, with the labels that the compiled pipeline gives them.
    ours.setdefault("step", {"app.kubernetes.io/part-of": "des", "app.kubernetes.io/component": "step"})
    assert sorted(ours) == sorted(COMPONENTS[overlay])
    return [
        *(Place(name, label, space) for name, label in ours.items()),
        Place("anywhere", {}),
        Place("neighbour", {"app": "other"}, space),
        Place("name server", {"k8s-app": "kube-dns"}, "kube-system"),
        Place("pipelines", {"app": "ml-pipeline"}, "kubeflow"),
        Place("ray operator", {"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system"),
    ]


def passes(objects: list[Object], source: Place, target: Place, protocol: str, port: int) -> bool:
    """Whether the policies let a connection through."""
    out = _allowed(objects, "Egress", source, target, protocol, port)
    return out and _allowed(objects, "Ingress", target, source, protocol, port)


def _policies(objects: list[Object]) -> list[Object]:
    return [found for found in objects if found["kind"] == "NetworkPolicy"]


def _allowed(objects: list[Object], direction: str, here: Place, there: Place, protocol: str, port: int) -> bool:
    specs = [
        policy["spec"]
        for policy in _policies(objects)
        if policy["metadata"]["namespace"] == here.namespace
        and direction in policy["spec"]["policyTypes"]
        and _selected(policy["spec"]["podSelector"], here.labels)
    ]
    if not specs:
        return True
    key, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return any(
        _port_fits(rule.get("ports"), protocol, port)
        and (peers not in rule or any(_peer_fits(peer, here, there) for peer in rule[peers]))
        for spec in specs
        for rule in spec.get(key, [])
    )


def _port_fits(ports: list[Object] | None, protocol: str, port: int) -> bool:
    return ports is None or any(one["protocol"] == protocol and one.get("port", port) == port for one in ports)


def _peer_fits(peer: Object, here: Place, there: Place) -> bool:
    assert set(peer) <= {"podSelector", "namespaceSelector"}, "the table's reader knows no ipBlock"
    if not there.namespace:
        return False
    if "namespaceSelector" in peer:
        space = _selected(peer["namespaceSelector"], {"kubernetes.io/metadata.name": there.namespace})
    else:
        space = there.namespace == here.namespace
    return space and _selected(peer.get("podSelector", {}), there.labels)


def _selected(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    fits = selector.get("matchLabels", {}).items() <= labels.items()
    for one in selector.get("matchExpressions", []):
        inside = labels.get(one["key"]) in one["values"]
        fits &= {"In": inside, "NotIn": not inside}[one["operator"]]
    return bool(fits)
