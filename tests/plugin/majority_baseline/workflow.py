"""The workflow: find, measure. What each step does stands in ``majority_baseline.stages``."""

from crucible_kitchen import Workflow
from majority_baseline.stages import BaselineConfig, commonest_answer, measure_answer

majority_baseline = Workflow("majority_baseline", commonest_answer, measure_answer, config=BaselineConfig)
