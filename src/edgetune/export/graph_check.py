"""Checks of an exported graph: what every artifact must keep, and what its target's provider must not meet.

Nothing here needs the device. Each problem is one sentence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, InputError, first_line
from edgetune.export.targets import GraphRules, Target
from edgetune.files import read_json
from edgetune.models.quiet import quiet

if TYPE_CHECKING:
    import onnx

# Paths of the machine that exported, as they would stand in a graph: /home/…, C:\…, file://…
_ABSOLUTE = re.compile(
    rb"(?:/(?:home|root|Users|tmp|work|var|mnt|opt|usr)/|[A-Za-z]:\\\\?[A-Za-z]|file://)[^\x00-\x20]{2,120}"
)
_STANDARD = ("", "ai.onnx")
# ONNX Runtime has them among the standard operators; the standard itself does not.
_UNREGISTERED = ("SimplifiedLayerNormalization",)


def check_graph(file: Path, target: Target) -> dict[str, Any]:
    """Check one graph against its target.

    Args:
        file: the graph; its weights lie beside it.
        target: what it is for.

    Returns:
        For the report: `opset`, `operators` (type → number), `types` of its tensors, `weights_file` (None where
        the weights lie in the graph itself), `static` (whether every input's shape is fixed).

    Raises:
        InputError: the graph is sound, and has what the target forbids.
        EdgetuneError: it was made wrongly: it is not valid ONNX, its weights lie elsewhere, it names this machine's folders,
            its shapes are not fixed where they should be. All problems are named, those with the target, too.
    """
    import onnx

    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:
        if isinstance(error, OSError | MemoryError):
            raise
        raise EdgetuneError(f"is not an ONNX graph: {first_line(error)}", where=file.name) from error
    broken = [
        *_invalid(model),
        *_external(model, file),
        *_absolute(file),
        *(_dynamic(model) if target.static else ()),
    ]
    if problems := [*broken, *_against(model, target.graph)]:
        kind = EdgetuneError if broken else InputError
        raise kind(
            f"the graph does not fit the target ({target.provider}): " + "; ".join(dict.fromkeys(problems)),
            where=file.name,
            fix="choose another target or precision; with options of your own in the target file, check those first",
        )
    return {
        "opset": next(entry.version for entry in model.opset_import if entry.domain in _STANDARD),
        "operators": dict(sorted(operators(model).items())),
        "types": sorted(_types(model)),
        "weights_file": next(iter(_locations(model)), None),
        "static": not [*_dynamic(model)],
    }


def operators(model: onnx.ModelProto) -> Counter[str]:
    """How often each operator type occurs, inner graphs included; those of other domains with their domain in front."""
    return Counter(f"{n.domain}:{n.op_type}" if n.domain not in _STANDARD else n.op_type for n in _nodes(model.graph))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and those within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    return (node for one in _graphs(graph) for node in one.node)


def _invalid(model: onnx.ModelProto) -> Iterator[str]:
    """What the ONNX checker and shape inference say. Weights stay on disk: those outside the graph are taken for inputs.

    The model builder writes shapes that are not theirs to its constants (no dimension for one) and within a norm that it
    takes apart (means of the whole width): those are inferred.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in _nodes(copy.graph):
        if node.op_type in _UNREGISTERED and node.domain in _STANDARD:
            node.domain = "com.microsoft"
    for graph in _graphs(copy.graph):
        guessed = [node for node in graph.node if node.op_type == "Constant" or "/LayerNorm/" in node.name]
        wrong = {name for node in guessed for name in node.output}
        told = [value for value in graph.value_info if value.name not in wrong]
        del graph.value_info[:]
        graph.value_info.extend(told)
    outside = [tensor for tensor in copy.graph.initializer if tensor.external_data]
    for tensor in outside:
        copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        copy.graph.initializer.remove(tensor)
    try:
        onnx.checker.check_model(copy)
        onnx.shape_inference.infer_shapes(copy, strict_mode=True)
    except onnx.checker.ValidationError as error:
        yield f"the ONNX checker says: {first_line(error)}"
    except onnx.shape_inference.InferenceError as error:
        yield f"shape inference says: {' '.join(str(error).split())[:300]}"


def _locations(model: onnx.ModelProto) -> list[str]:
    found = (
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    )
    return list(dict.fromkeys(found))


def _external(model: onnx.ModelProto, file: Path) -> Iterator[str]:
    names = _locations(model)
    if len(names) > 1:
        yield f"its weights lie in {len(names)} files ({', '.join(names[:3])}), not in one"
    for name in names:
        if Path(name).name != name or "\\" in name:
            yield f"its weights lie at {name}, not beside the graph"
        elif not (file.parent / name).is_file():
            yield f"its weights' file {name} is missing"


def _absolute(file: Path) -> Iterator[str]:
    if found := _ABSOLUTE.search(file.read_bytes()):
        yield f"it names a place of the machine that exported it: {found[0].decode(errors='replace')}"


def check_places(artifact: Path, *places: Path) -> None:
    """Raise EdgetuneError where a file of an artifact, its weights left out, names one of these folders of this machine."""
    for file in sorted(artifact.iterdir()):
        if file.is_file() and file.suffix != ".data":
            content = file.read_bytes()
            for place in places:
                if str(place.absolute()).encode() in content:
                    raise EdgetuneError(
                        f"names a place of this machine: {place.absolute()}",
                        where=file.name,
                        fix="report this model; its folder may be named in a file that it brings",
                    )


def _against(model: onnx.ModelProto, rules: GraphRules) -> Iterator[str]:
    for entry in model.opset_import:
        if entry.domain in _STANDARD and entry.version > rules.opset:
            yield f"its opset is {entry.version}, newer than {rules.opset}"
    known = {name if name != "ai.onnx" else "" for name in rules.domains}
    counts: Counter[str] = Counter()
    for node in _nodes(model.graph):
        domain = "" if node.domain in _STANDARD else node.domain
        if domain not in known:
            counts[f"operators of the domain {domain}"] += 1
        elif node.op_type in rules.forbidden_ops:
            counts[node.op_type] += 1
    for what, count in counts.items():
        yield f"it has {count} {what}, which the target forbids"
    for kind in sorted(_types(model) & {name.lower() for name in rules.forbidden_types}):
        yield f"it has tensors of the type {kind}, which the target forbids"


def _types(model: onnx.ModelProto) -> set[str]:
    """Types of inputs, outputs, values and weights, in ONNX's words, lower case."""
    import onnx

    graph = model.graph
    numbers = {tensor.data_type for tensor in graph.initializer}
    numbers |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    return {onnx.TensorProto.DataType.Name(number).lower() for number in numbers if number}


def _dynamic(model: onnx.ModelProto) -> Iterator[str]:
    weights = {tensor.name for tensor in model.graph.initializer}
    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            shape = value.type.tensor_type.shape
            if value.name not in weights and any(not dim.HasField("dim_value") for dim in shape.dim):
                yield f"the {kind} {value.name} has no fixed shape"
                return  # they all have the same cause


def golden_ids(artifact: Path, most: int) -> list[int]:
    """The first golden prompt's tokens, `most` of them at most (one at least)."""
    return list(read_json(artifact / "golden.json")["prompts"][0]["ids"][: max(1, most)])


_GREEDY_TOKENS = 8
_TIE = 1e-2  # difference of two logits below which either token may be the likeliest


def check_greedy(merged: Path, artifact: Path, *, trust_remote_code: bool = False) -> None:
    """Raise EdgetuneError unless a float32 artifact's likeliest tokens after a golden prompt are the merged model's."""
    from edgetune.export.graph_reader import Graph
    from edgetune.export.readers import Weights, longest

    ids = golden_ids(artifact, min(longest(merged), longest(artifact)) - _GREEDY_TOKENS)
    wanted, found = Weights(merged, trust_remote_code), Graph(artifact)
    for _ in range(_GREEDY_TOKENS):
        with quiet():
            right, ours = wanted.feed(ids)[-1], found.feed(ids)[-1]
        best, other = int(right.argmax()), int(ours.argmax())
        if not float(right[best] - right[other]) <= _TIE:
            raise EdgetuneError(
                f"the graph's likeliest token after a golden prompt is {other}, the merged model's is {best}",
                where=artifact.name,
                fix="the architecture is exported wrongly: please report this model",
            )
        ids = [best]
