"""How good generated views are, on heads that nothing was trained on."""

from gafext.evaluation.evaluation import Evaluation, Scores, Subject, as_portrait, portrait_camera, subjects, table

__all__ = ["Evaluation", "Scores", "Subject", "as_portrait", "portrait_camera", "subjects", "table"]
