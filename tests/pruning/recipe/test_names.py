"""What `--help` lists of registries that it may not import."""

from pruning.budget.importance import IMPORTANCE, SMOOTHINGS
from pruning.budget.planners import PLANNERS
from pruning.recipe import names
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.expert_criteria import EXPERT_CRITERIA


def test_the_names_in_help_are_those_of_the_registries():
    assert names.CRITERIA == tuple(CHANNEL_CRITERIA)
    assert names.ATTRIBUTIONS == tuple(EXPERT_CRITERIA)
    assert names.PLANNERS == tuple(PLANNERS)
    assert names.WEIGHTS == tuple(IMPORTANCE)
    assert names.SMOOTHINGS == tuple(SMOOTHINGS)
