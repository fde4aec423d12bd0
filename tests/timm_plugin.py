"""pytest plugin that points timm's own, unmodified tests/test_models.py at the models of this package.

timm's file lists models at import, partly by timm's module names; here every such list becomes ours. LS_VISION_MODELS
narrows it further: comma-separated patterns.
"""
import fnmatch
import os

import timm
import timm.models

import ls_vision  # noqa: F401, registers the models

MODULES = ('vil_ls', 'cvt_ls')
PATTERNS = os.environ.get('LS_VISION_MODELS', '*').split(',')
_list_models = timm.list_models


def our_models(filter='', module='', **kwargs):
    names = _list_models(filter, MODULES, **kwargs)
    return [name for name in names if any(fnmatch.fnmatch(name.split('.')[0], p) for p in PATTERNS)]


def our_pretrained(filter='', exclude_filters=''):
    return our_models(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


timm.list_models = our_models
timm.list_pretrained = our_pretrained


def pytest_collection_modifyitems(config, items):
    """Leaves out the tests that name timm's own models."""
    ours = _list_models(module=MODULES)
    kept = [item for item in items if any(f'-{n}]' in item.name or f'[{n}]' in item.name or f'-{n}.' in item.name
                                          for n in ours)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
