"""Profiles of the transform codec from a model and a text: means, bases, steps and bounds, with a certificate."""

from kvferry.calibration.certificate import CalibratedBounded, certified_schemes
from kvferry.calibration.identity import check_model, model_identity
from kvferry.calibration.run import calibrate
from kvferry.calibration.settings import Settings

__all__ = ["CalibratedBounded", "Settings", "calibrate", "certified_schemes", "check_model", "model_identity"]
