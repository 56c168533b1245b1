"""A small network for onnxruntime, in place of peers of the benchmarks, whose export takes 10 s."""

from pathlib import Path

import onnx


def write_mean_network(folder: Path) -> list[tuple[str, str, Path]]:
    """What `onnx_peers.export_networks` returns, for the mean of each channel."""
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 3, 224, 224])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 3])
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        onnx.helper.make_node("Flatten", ["means"], ["logits"]),
    ]
    graph = onnx.helper.make_graph(nodes, "means", [images], [logits])
    file = folder / "means.int8.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), file)
    return [("means", "onnxruntime int8", file)]
