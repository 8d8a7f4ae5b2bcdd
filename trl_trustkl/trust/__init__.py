"""The trust region of one update: snapshot, measurement, limits, backtracking.

Needs torch alone, so that `trl_trustkl.trust_region` can be imported without TRL; knows nothing of models and trainers.
"""
