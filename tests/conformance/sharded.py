"""A worker of the tests of distributed training, started by torchrun on two processes of the CPU.

    torchrun --nproc_per_node 2 sharded.py HOW MODEL      HOW: ddp, fsdp1, fsdp2, tensor

Each process computes the gradients of the whole batch alone and of its half together with the other; both must agree.
"""
import sys

import torch
import torch.distributed as dist
from families import images, linears, small
from torch import nn

TARGETS = torch.tensor([1, 2, 3, 4])


def loss(model, x, targets):
    return nn.functional.cross_entropy(model(x), targets)


def wrap(how, model):
    from torch.distributed.device_mesh import init_device_mesh
    if how == 'ddp':
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh('cpu', (2,))
    if how == 'fsdp1':
        from torch.distributed.fsdp import FullyShardedDataParallel
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device('cpu'))
    if how == 'fsdp2':
        from torch.distributed.fsdp import fully_shard
        for module in list(model.modules()):
            if type(module).__name__.endswith('Block'):
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    plan = {n: ColwiseParallel() if n.endswith('fc1') else RowwiseParallel()
            for n in linears(model) if n.endswith(('mlp.fc1', 'mlp.fc2'))}
    assert plan
    return parallelize_module(model, mesh, plan)


def full_tensor(gradient):
    return gradient.full_tensor() if hasattr(gradient, 'full_tensor') else gradient


def check_gradients(how, model, expected):
    if how == 'fsdp1':
        from torch.distributed.fsdp import FullyShardedDataParallel
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    else:
        grads = {n: full_tensor(p.grad) for n, p in model.named_parameters()}
    for n, gradient in grads.items():
        torch.testing.assert_close(gradient, expected[n.removeprefix('module.')], rtol=1e-3, atol=1e-5)


def main(how, name):
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    x, rank = images(4), dist.get_rank()
    model = small(name)
    loss(model, x, TARGETS).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    before = model(x).detach()

    wrapped = wrap(how, small(name))
    if how == 'tensor':  # all of the batch in both
        own, targets = x, TARGETS
    else:
        own, targets = x.chunk(2)[rank], TARGETS.chunk(2)[rank]
    value = loss(wrapped, own, targets)
    value.backward()
    check_gradients(how, wrapped, expected)
    with torch.no_grad():
        torch.testing.assert_close(full_tensor(wrapped(x)), before, rtol=1e-3, atol=1e-4)
    torch.optim.SGD(wrapped.parameters(), lr=.01).step()
    assert torch.isfinite(loss(wrapped, own, targets))
    print('agreed', rank)
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
