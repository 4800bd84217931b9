import pytest

from trl_mprm import ProcessRewardModel, StepFormat
from trl_mprm.models.loading import add_marker, load_model, load_processing_class


@pytest.fixture(scope="module")
def prm(tiny_folders):
    folder = tiny_folders["qwen2_5_vl"]
    model, processing_class = load_model(folder), load_processing_class(folder, vision=True)
    add_marker(model, processing_class, StepFormat())
    return ProcessRewardModel(model, processing_class)
