"""Object detection with timm backbones: torchvision's detectors, annotation readers, tiles and COCO metrics."""
from .annotations import AnnotationError, Annotations
from .detectors import DETECTORS, build_detector
from .evaluation import evaluate_detections
from .readers import read_annotations
from .tiling import detect

__all__ = [
    'DETECTORS', 'AnnotationError', 'Annotations', 'build_detector', 'detect', 'evaluate_detections',
    'read_annotations',
]
