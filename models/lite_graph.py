"""The lite encoder and the look-up as an ONNX graph, run by ONNX Runtime one image and one thread at a time.

A run sees one image and nothing else, so neither features nor codes depend on its neighbours or on how many threads there
are; several images run side by side, each in its own cache. On two cores that is five times as fast as TorchScript over a
padded batch (docs/tried.md). The graph is built here, from weights in memory: no model file is read or executed.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from models.captioner import Quantiser
from models.lite_encoder import PIXEL_MEAN, PIXEL_SCALE, WIDTH, Block, FoldedConv, LiteEncoder
from models.model import Pixels

OPSET, IR_VERSION = 17, 8  # what ONNX Runtime has read since 1.12


class LiteGraph:
    """A LiteEncoder and a quantiser as they are now, on the CPU: features and codes of images, `threads` of them at a time."""

    def __init__(self, encoder: LiteEncoder, quantiser: Quantiser, side: int, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            _Graph(encoder, quantiser, side).serialised, options, providers=["CPUExecutionProvider"]
        )
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    def features(self, pixels: Sequence[Pixels]) -> list[NDArray[np.float32]]:
        """(L, F) of each image."""
        return list(self._threads.map(partial(self._one, "features"), pixels))

    def codes(self, pixels: Sequence[Pixels]) -> list[NDArray[np.int64]]:
        """(L,) of each image: its index vector."""
        return list(self._threads.map(partial(self._one, "codes"), pixels))

    def _one(self, wanted: str, pixels: Pixels) -> NDArray[Any]:
        found: NDArray[Any] = self._session.run([wanted], {"pixels": pixels})[0]
        return found


class _Graph:
    """LiteEncoder.forward, Quantiser.tokens and look_up written down as nodes of ONNX.

    pixels (S, S, 3) uint8 → features (L, F) float32 and codes (L,) int64; only what a run asks for is computed.
    """

    def __init__(self, encoder: LiteEncoder, quantiser: Quantiser, side: int) -> None:
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._weight("lowest", np.float32(0))
        self._weight("highest", np.float32(6))
        x = self._add("Cast", "pixels", to=TensorProto.FLOAT)
        x = self._add("Transpose", x, perm=[2, 0, 1])
        x = self._add("Sub", x, self._weight("mean", np.float32(PIXEL_MEAN)))
        x = self._add("Mul", x, self._weight("scale", np.float32(1 / PIXEL_SCALE)))
        x = self._add("Unsqueeze", x, self._weight("first", np.array([0], np.int64)))
        x = self._conv(x, encoder.stem)
        for block in encoder.blocks:
            x = self._block(x, block)
        x = self._add("Reshape", x, self._weight("flat", np.array([WIDTH, -1], np.int64)))
        x = self._add("Transpose", x, perm=[1, 0])
        outputs = [
            helper.make_tensor_value_info(self._named("features", x), TensorProto.FLOAT, [None, WIDTH]),
            helper.make_tensor_value_info(self._named("codes", self._look_up(x, quantiser)), TensorProto.INT64, [None]),
        ]
        pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, [side, side, 3])
        graph = helper.make_graph(self._nodes, "lite", [pixels], outputs, self._weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        self.serialised: bytes = model.SerializeToString()

    def _look_up(self, x: str, quantiser: Quantiser) -> str:
        project, codes = quantiser.project, _array(quantiser.codebook.codes)
        x = self._add("Sub", x, self._weight("feature_mean", _array(quantiser.mean)))
        x = self._add("Div", x, self._weight("feature_std", _array(quantiser.std)))
        x = self._add("MatMul", x, self._weight("projection", _array(project.weight).T))
        x = self._add("Add", x, self._weight("projection_bias", _array(project.bias)))
        ones = self._weight("ones", np.ones(codes.shape[1], np.float32))
        x = self._add("LayerNormalization", x, ones, axis=-1, epsilon=1e-5)
        x = self._add("MatMul", x, self._weight("codes_twice", 2 * codes.T))
        x = self._add("Sub", self._weight("code_lengths", (codes * codes).sum(1)), x)
        return self._add("ArgMin", x, axis=1, keepdims=0)  # the first of equal minima, as look_up's

    def _block(self, x: str, block: nn.Module) -> str:
        assert isinstance(block, Block)
        wide = x if isinstance(block.expand, nn.Identity) else self._conv(x, block.expand)
        narrow = self._conv(self._conv(wide, block.filter), block.narrow)
        return self._add("Add", x, narrow) if block.adds else narrow

    def _conv(self, x: str, folded: nn.Module) -> str:
        assert isinstance(folded, FoldedConv)
        conv, number = folded.conv, len(self._nodes)
        assert conv.bias is not None
        weight = self._weight(f"weight{number}", _array(conv.weight))
        bias = self._weight(f"bias{number}", _array(conv.bias))
        before, after = folded.pad[:2] if folded.pad else (conv.kernel_size[0] // 2,) * 2
        y = self._add(
            "Conv", x, weight, bias, kernel_shape=list(conv.kernel_size), strides=list(conv.stride),
            pads=[before, before, after, after], group=conv.groups,
        )  # fmt: skip
        return self._add("Clip", y, "lowest", "highest") if folded.clamp else y

    def _add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def _named(self, name: str, value: str) -> str:
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        return name

    def _weight(self, name: str, value: NDArray[Any] | np.float32) -> str:
        self._weights.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array
