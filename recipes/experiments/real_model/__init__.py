"""A small real model trained to follow verifiable instructions, and measured on IFEval before and after."""
