"""What each rank of tests/parallel/test_ranks.py does."""
import copy

import timm
import torch
import torch.distributed as dist
from strip_cases import CVT, VIL, Case, build, error, images, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ls_vision.layers import LongShortAttention2d
from ls_vision.parallel import gather_maps, parallelize, row_multiple, split_image
from ls_vision.parallel.layers import StripDropPath

CASES = {'vil': Case(2, 171, args=dict(VIL, window_size=7)), 'cvt': Case(2, 75, model='cvt_ls_13', args=CVT)}


def space():
    return init_device_mesh('cpu', (dist.get_world_size(),), mesh_dim_names=('space',))['space']


def link_of(model):
    return model.stages[0].patch_embed.strips.link


def all_checks():
    sent = {name: bytes_sent(case) for name, case in dict(CASES, cvt=CASES['cvt']._replace(height=100)).items()}
    return dict(
        bytes_sent=sent, refusals=refusals(), draws=draws(),
        copy=copy_of_split(), changed=changed_model(), inference=inference(), half=half_precision(), ddp=ddp())


def bytes_sent(case):
    """What is counted for one forward and one backward pass, beside the specification's formulas."""
    mesh = space()
    model = parallelize(build(case), mesh)
    link = link_of(model)
    x = images(case)
    strip = split_image(x, mesh, row_multiple(model))
    link.sent.clear()
    y = model(strip)
    forward = dict(link.sent)
    y.square().sum().backward()
    return forward, {key: n - forward.get(key, 0) for key, n in link.sent.items()}, formulas(model, x)


def formulas(model, x):
    """Numbers of 4 bytes of the forward pass at one of two ranks."""
    out = dict.fromkeys(('summaries', 'global tokens', 'window halo', 'convolution halo'), 0)
    B, size = x.shape[0], (x.shape[2], x.shape[3])
    for stage in model.stages:
        conv = stage.patch_embed.proj
        if stage.patch_embed.padding and dist.get_rank() == 0:  # only the strip below needs rows
            out['convolution halo'] += B * (conv.kernel_size[0] - conv.stride[0]) * size[1] * conv.in_channels
        size = stage.patch_embed.feat_size(size)
        for layer in (m for m in stage.modules() if isinstance(m, LongShortAttention2d)):
            h, r, g, C = layer.num_heads, layer.rank, layer.num_global_tokens, layer.dim
            out['summaries'] += B * (2 * h * r + 2 * r * C)
            out['global tokens'] += B * (2 * g * h + g * C)
            out['window halo'] += B * 2 * max(layer.window_size // 2, 1) * size[1] * C
            out['convolution halo'] += 0 if layer.query is None else B * size[1] * C
    out['head'] = B * model.num_features
    return out


def refusals():
    """The messages of wrong calls."""
    mesh, rank = space(), dist.get_rank()
    model = build(CASES['vil'])
    x = images(CASES['vil'])

    def message(function, *args):
        try:
            function(*args)
        except (ValueError, NotImplementedError) as e:
            return f'{type(e).__name__}: {e}'
        return 'no error'

    out = {
        'full attention': message(parallelize, timm.create_model('vil_ls_medium', depths=(1, 1, 1, 1)), mesh),
        'other library': message(parallelize, torch.nn.Linear(2, 2), mesh),
        'pooling': message(parallelize, timm.create_model('cvt_ls_13', depths=(1, 1, 1), global_pool='max'), mesh),
        'two dimensions': message(parallelize, model, init_device_mesh('cpu', (1, 2))),
        'no mesh': message(parallelize, model, 2),
        'models': message(parallelize, build(CASES['vil' if rank else 'cvt']), mesh),
        'too many ranks': message(split_image, x, mesh, 171),
        'images': message(split_image, x + rank, mesh, 56),
        'image sizes': message(split_image, x[..., rank:], mesh, 56),
        'dimensions': message(split_image, x[0], mesh, 56),
    }
    parallelize(model, mesh)
    strip = split_image(x, mesh, 56)
    out.update({
        'twice': message(parallelize, model, mesh),
        'cut': message(model, x[:, :, :60] if rank == 0 else x[:, :, 60:]),
        'dtype': message(model, strip.to(torch.float64 if rank else torch.float32)),
        'batch': message(model, strip[rank:]),
        'mode': message(model.train(rank == 0), strip),
        'gradients': message(torch.no_grad()(model.train()) if rank else model, strip),
        'maps': message(gather_maps, strip[rank:], mesh),
        'attention maps': message(
            model.stages[0].blocks[0].attn.attention_maps, torch.randn(1, 5, 8), (2, 2)),
    })
    return out


def draws():
    """Outputs of a model that drops, and the numbers that its drop paths draw when a block is recomputed."""
    mesh = space()
    case = CASES['vil']._replace(args=dict(
        VIL, window_size=7, drop_rate=.3, proj_drop_rate=.2, attn_drop_rate=.1, drop_path_rate=.5))
    model = parallelize(build(case), mesh)
    torch.manual_seed(10 + dist.get_rank())
    strip = split_image(images(case), mesh, 56)
    outputs = [model(strip).detach() for _ in range(2)]
    model.set_grad_checkpointing()
    masks = []
    for module in model.modules():
        if isinstance(module, StripDropPath):
            module.register_forward_hook(lambda m, x, y: masks.append((m.number, y.detach().abs().sum((1, 2)) > 0)))
    model(strip).sum().backward()
    return dict(outputs=outputs, masks=masks, modes=sum(isinstance(m, StripDropPath) for m in model.modules()))


def copy_of_split():
    """Whether a deep copy, as an EMA keeps it, computes the same, and whose strips it has."""
    mesh, case = space(), CASES['cvt']
    model = parallelize(build(case).eval(), mesh)
    other = copy.deepcopy(model)
    strip = split_image(images(case), mesh, 32)
    same_keys = list(other.state_dict()) == list(build(case).state_dict())
    own = other.stages[0].patch_embed.strips is not model.stages[0].patch_embed.strips
    return torch.equal(model(strip), other(strip)), same_keys, own


def changed_model():
    """Error of gradients where a classifier is new and a frozen weight no longer is, after `parallelize`."""
    mesh, case = space(), CASES['vil']
    x, results = images(case), []
    for split in (False, True):
        model = build(case)
        model.norm.requires_grad_(False)
        model = parallelize(model, mesh) if split else model
        torch.manual_seed(0)
        model.reset_classifier(7)
        model.norm.requires_grad_(True)
        results.append(train(model, split_image(x, mesh, 56) if split else x, case, None))
    return max(error(results[1][key], results[0][key]) for key in results[0] if key.startswith('gradient'))


@torch.inference_mode()
def inference():
    mesh = space()
    return {
        name: error(
            parallelize(build(case).eval(), mesh)(split_image(images(case), mesh, multiple)),
            build(case).eval()(images(case)))
        for (name, case), multiple in zip(CASES.items(), (56, 32))}


def half_precision():
    """Error of logits in bfloat16 autocast, of the split and of the unsplit model against float32."""
    mesh, case = space(), CASES['vil']
    with torch.autocast('cpu', torch.bfloat16):
        split = parallelize(build(case), mesh)(split_image(images(case), mesh, 56))
        whole = build(case)(images(case))
    exact = build(case)(images(case))
    return error(split.float(), exact), error(whole.float(), exact)


def compiled():
    """Errors of logits and gradients under `torch.compile`, without code generation."""
    mesh, case = space(), CASES['vil']
    model = torch.compile(parallelize(build(case), mesh), backend='aot_eager')
    found = train(model, split_image(images(case), mesh, 56), case, mesh)
    expected = train(build(case), images(case), case, None)
    return max(
        error(found[key.replace(' ', ' _orig_mod.') if key.startswith('gradient') else key], expected[key])
        for key in expected if key.startswith(('gradient', 'output')))


def ddp():
    """Error of gradients with DDP over all ranks, which averages what is equal already."""
    mesh, case = space(), CASES['vil']
    model = DistributedDataParallel(parallelize(build(case), mesh))
    found = train(model, split_image(images(case), mesh, 56), case, mesh)
    expected = train(build(case), images(case), case, None)
    return max(error(found[key.replace(' ', ' module.')], expected[key])
               for key in expected if key.startswith('gradient'))


def sharded(order, over):
    """Errors of gradients and of three steps in double precision with FSDP2 beside the strips, on 2 x 2 ranks."""
    mesh = init_device_mesh('cpu', (2, 2), mesh_dim_names=('data', 'space'))
    case = CASES['vil']._replace(dtype=torch.float64)  # AdamW enlarges the rounding of small gradients
    x = torch.randn(4, 3, 171, 40, generator=torch.Generator().manual_seed(3)).double()
    own = x.chunk(2)[mesh['data'].get_local_rank()]
    model = build(case)
    if order == 'strips first':
        parallelize(model, mesh['space'])
    shard_mesh = mesh['data'] if over == 'data' else mesh['data', 'space']
    for stage in model.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=shard_mesh)
    fully_shard(model, mesh=shard_mesh)
    if order == 'shards first':
        parallelize(model, mesh['space'])
    label = torch.tensor([1, 3, 0, 2])
    found = steps(model, split_image(own, mesh['space'], 56), label.chunk(2)[mesh['data'].get_local_rank()])
    expected = steps(build(case), x, label)
    full = {key: t.full_tensor() if hasattr(t, 'full_tensor') else t for key, t in found.items()}
    return {key: error(full[key], t) for key, t in expected.items() if not key.endswith('to_dynamic_projection.bias')}


def steps(model, x, label):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    out = {}
    for step in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), label).backward()
        if step == 0:
            out.update({f'gradient {key}': p.grad.detach().clone() for key, p in model.named_parameters()})
        optimizer.step()
    out.update({f'state {key}': t.detach().clone() for key, t in model.state_dict().items()})
    return out
