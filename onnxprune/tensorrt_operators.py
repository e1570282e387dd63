"""Which operators TensorRT's ONNX parser takes, and in which types: the table of onnx-tensorrt, docs/operators.md, at TensorRT 10.15.

Operators that are not named here are not taken.
"""

from __future__ import annotations

from onnx import TensorProto

VERSION = "10.15"
OPSETS = (9, 24)

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_NARROW = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})
_INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})
_BOOL = frozenset({TensorProto.BOOL})
_FLOAT8 = frozenset({TensorProto.FLOAT8E4M3FN})
_QUANTIZED = _FLOAT8 | {TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT4E2M1}

_BY_TYPES: tuple[tuple[frozenset[int], str], ...] = (
    (
        _FLOATS,
        """Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh CumSum Dropout
        Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization HardSigmoid HardSwish Hardmax
        ImageScaler InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul
        MaxPool MeanVarianceNormalization PRelu ParametricSoftplus QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike
        RandomUniform RandomUniformLike Reciprocal Resize RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus
        Softsign Sqrt Tan Tanh ThresholdedRelu Upsample""",
    ),
    (_NARROW, "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign"),
    (frozenset({TensorProto.FLOAT}), "STFT"),
    (
        _FLOATS | _INTEGERS,
        """Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul Neg Pad Pow Range
        ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter
        ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK""",
    ),
    (
        _FLOATS | _INTEGERS | _BOOL,
        """Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence Shape Size Slice
        Split Squeeze Tile Transpose Trilu Unsqueeze Where""",
    ),
    (_BOOL, "And Not Or Xor"),
    (_FLOATS | _INTEGERS | _BOOL | {TensorProto.UINT8}, "Cast CastLike"),
    (
        _FLOATS | _INTEGERS | _BOOL | _FLOAT8 | {TensorProto.INT4, TensorProto.FLOAT4E2M1},
        "Constant ConstantOfShape",
    ),
    (_QUANTIZED, "DequantizeLinear"),
    (_FLOATS | _INTEGERS | {TensorProto.INT8}, "Gelu"),
    (_FLOATS | _FLOAT8 | {TensorProto.INT8}, "Attention"),
    (_FLOATS | _INTEGERS | _FLOAT8, "Mean"),
    (_FLOATS | {TensorProto.INT32}, "TensorScatter"),
)
OPERATORS: dict[str, frozenset[int]] = {op: types for types, names in _BY_TYPES for op in names.split()}

KNOWN_TYPES = _FLOATS | _INTEGERS | _BOOL | _QUANTIZED | {TensorProto.DOUBLE, TensorProto.UINT8}
TYPED_INPUT = {"Where": 1}  # of which input the table speaks, where it is not the first: Where's is a condition
