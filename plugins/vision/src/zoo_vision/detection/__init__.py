"""Detectors on the backbones of this plugin: Mask R-CNN, Cascade Mask R-CNN, RetinaNet.

Order of reading: ``boxes`` (geometry), ``heads`` (the layers), ``regions`` (RoIAlign), ``detectors`` (the networks and
how they look for objects), ``training`` (targets and losses), ``building`` (what the cards build), ``reference``
(mmdetection's format).
"""

from .detectors import Detections, Detector, OneStageDetector, TwoStageDetector

__all__ = ["Detections", "Detector", "OneStageDetector", "TwoStageDetector"]
