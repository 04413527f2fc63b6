"""The only file that knows the mesh (data, fsdp, tensor), and which letter of types.py lies along which axis.

A tensor is described by its letters ("E H D"), as in weights.py. Parameters, their gradients and their moments are
split along fsdp by the model dim and along tensor by heads, MLP dim or vocabulary; activations are split by batch
and by heads, and carry the whole model dim, so a layer's weights are gathered along fsdp when it runs.
An axis that does not divide a dim leaves it whole.
"""

import contextlib
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dms_jax.config import require

AXES = ("data", "fsdp", "tensor")
_HEADS = {"H": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)}
PARAMETERS = {**_HEADS, "E": ("fsdp",)}
ACTIVATIONS = {**_HEADS, "B": ("data", "fsdp")}
CACHE = {"H": "tensor", "K": "tensor", "N": "tensor"}  # heads; and the pool (N pages), of which every device has one


def make_mesh(shape: Sequence[int], devices: Sequence | None = None) -> Mesh:
    """A mesh of `shape` (data, fsdp, tensor) over the devices given, or over the first of those that there are.

    Raises:
      ConfigError: a shape that is not three positive sizes, or that needs other devices than there are.
    """
    require(len(shape) == 3 and min(shape) > 0, "mesh", tuple(shape), "expected three sizes: data, fsdp, tensor")
    size = math.prod(shape)
    if devices is None:
        devices = jax.devices()[:size] if jax.process_count() == 1 else jax.devices()
    require(size == len(devices), "mesh", tuple(shape), f"needs {size} devices, there are {len(devices)}")
    return jax.make_mesh(tuple(shape), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def tensor_meshes(data: int, tensor: int) -> list[Mesh]:
    """`data` meshes of `tensor` devices each: what a group of engines decodes on."""
    require(data > 0 and tensor > 0, "devices", (data, tensor), "expected two sizes: data, tensor")
    devices = jax.devices()
    require(data * tensor <= len(devices), "devices", (data, tensor), f"there are {len(devices)}")
    return [make_mesh((1, 1, tensor), devices[n * tensor : (n + 1) * tensor]) for n in range(data)]


def tensor_ways(mesh: Mesh) -> int:
    """How many parts the heads are split in."""
    return mesh.shape["tensor"]


def partition(letters: str, shape: Sequence[int], sizes: dict[str, int], table: dict) -> PartitionSpec:
    """The PartitionSpec of a tensor with these letters and this shape; `sizes` are those of the mesh axes."""
    names = letters.split()
    require(len(names) == len(shape), "letters", letters, f"the tensor has shape {tuple(shape)}")
    parts = []
    for letter, dim in zip(names, shape, strict=True):
        axes = tuple(axis for axis in table.get(letter, ()) if sizes[axis] > 1)
        whole = not axes or dim % math.prod(sizes[axis] for axis in axes)
        parts.append(None if whole else axes)
    return PartitionSpec(*parts)


def parameter(mesh: Mesh, letters: str, shape: Sequence[int]) -> NamedSharding:
    """Where a parameter with these letters lies."""
    return NamedSharding(mesh, partition(letters, shape, dict(mesh.shape), PARAMETERS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
    """Rows of a batch `[B, ...]` over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ACTIVATIONS["B"]))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """How many parts a batch is split in: every micro-batch must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in ACTIVATIONS["B"])


def constrain(x: jax.Array, letters: str, table: dict = ACTIVATIONS) -> jax.Array:
    """Lays an activation (or a gathered weight) out over the mesh in force; the array itself where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(letters, x.shape, dict(mesh.shape), table))


def by_rows(function, letters: str):
    """`function(rows, whole)` run by each device on its own rows of the arrays `rows` `[B, ...]`, its results summed.

    `whole`, a list, is gathered once along the axes that split a batch, and its gradient summed over them once,
    however often the function reads it. Along tensor, arrays are split as the compiler sees fit, `whole` by `letters`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in ACTIVATIONS["B"] if not mesh.empty and mesh.shape[axis] > 1)
    if not axes:
        return function

    def run(rows, whole):
        dtypes = [x.dtype for x in whole]

        def local(rows, whole):
            whole = [jax.lax.pcast(x, axes, to="varying").astype(t) for x, t in zip(whole, dtypes, strict=True)]
            return jax.lax.psum(function(rows, whole), axes)

        # In float32, so that their gradients are summed in it (and XLA for CPU cannot sum others here).
        whole = [constrain(x.astype("float32"), letters) for x in whole]
        specs = (PartitionSpec(axes), PartitionSpec())
        return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(), axis_names=set(axes))(rows, whole)

    return run


def by_heads(function, letters: Sequence[str]):
    """`function(*arrays)` run by each device on its own rows and heads, the result like the first array.

    For what the compiler cannot split, as a kernel: attention needs nothing of another row or KV head. Where tensor
    does not divide the KV heads (the K of `letters`), every device of it does all heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def run(*arrays):
        sizes, table = dict(mesh.shape), dict(ACTIVATIONS)
        heads = {x.shape[named.split().index("K")] for named, x in zip(letters, arrays, strict=True) if "K" in named}
        if any(n % sizes["tensor"] for n in heads):
            table |= {"H": (), "K": ()}
        specs = tuple(partition(named, x.shape, sizes, table) for named, x in zip(letters, arrays, strict=True))
        return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)

    return run


def per_device(function, inputs, outputs):
    """`function` run by each device along tensor on its own heads and its own pool; for the cache while decoding.

    inputs, outputs: trees of letters ("B K D"); a tensor without a letter of CACHE is given to each device whole.

    XLA's compiler (jaxlib 0.11.2) dies of an empty input of such a computation: each device makes its own, and
    `function` may close over no empty constant.
    """

    def specs(tree):
        return jax.tree.map(lambda letters: PartitionSpec(*(CACHE.get(letter) for letter in letters.split())), tree)

    def run(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        leaves, tree = jax.tree.flatten(arrays)
        places = jax.tree.leaves(specs(inputs))
        shapes = [NamedSharding(mesh, spec).shard_shape(x.shape) for x, spec in zip(leaves, places, strict=True)]
        parts = [jax.ShapeDtypeStruct(shape, x.dtype) for x, shape in zip(leaves, shapes, strict=True)]
        given, in_specs = zip(*((x, spec) for x, spec in zip(leaves, places, strict=True) if x.size), strict=True)
        local = functools.partial(_with_empty_parts, function, tree, parts)
        return jax.shard_map(local, in_specs=in_specs, out_specs=specs(outputs), check_vma=False)(*given)

    return run


def _with_empty_parts(function, tree, parts: Sequence[jax.ShapeDtypeStruct], *given: jax.Array):
    """`function` of the `tree` of `parts`, of which those that are not empty are given."""
    full = iter(given)
    return function(*jax.tree.unflatten(tree, [next(full) if x.size else jnp.zeros(x.shape, x.dtype) for x in parts]))


def all_agree(flags: jax.Array) -> jax.Array:
    """Inside `per_device`: True where the flag is True on every device along tensor."""
    return jax.lax.pmin(flags.astype("int32"), "tensor") > 0


def on_host():
    """A context in which new arrays are made in host memory, so that a whole model need not fit one device.

    Where jax was told to leave the CPU out (JAX_PLATFORMS), they are made where they always are.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def place(tree, shardings):
    """Puts host arrays that every process holds whole (weights, a batch) where they belong, each device its part."""

    def put(x, sharding: NamedSharding):
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def gather(tree):
    """Host copies of whole arrays, on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))
