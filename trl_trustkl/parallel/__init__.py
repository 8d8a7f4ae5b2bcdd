"""What the processes of a run do together: gather, reduce, agree, fail.

Imports accelerate, `types` and `errors`; everything that needs several processes asks it.
"""
