"""Evaluation of generated views on held-out heads."""

from gafext.evaluation.evaluation import Evaluation, Scores, Subject, as_portrait, portrait_camera, subjects, table

__all__ = ["Evaluation", "Scores", "Subject", "as_portrait", "portrait_camera", "subjects", "table"]
