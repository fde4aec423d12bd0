"""Suggestions for misspelt names."""
from ls_vision.runtime.spelling import did_you_mean


def test_close_names():
    assert did_you_mean('epoch', ['epochs', 'model']) == "; did you mean 'epochs'?"
    assert did_you_mean('model-kwargs', ['model_kwargs']) == "; did you mean 'model_kwargs'?"
    assert did_you_mean('vil_ls_medum', ['vil_ls_medium', 'vil_ls_small', 'resnet18'], count=2) == (
        "; did you mean 'vil_ls_medium' or 'vil_ls_small'?")


def test_no_close_name():
    assert did_you_mean('abc', ['xyz']) == ''
