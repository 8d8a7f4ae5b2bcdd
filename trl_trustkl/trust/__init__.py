"""The trust region of one update: snapshot, measurement, limits, backtracking.

Needs only torch, so that `trl_trustkl.trust_region` can be imported without TRL.
"""
