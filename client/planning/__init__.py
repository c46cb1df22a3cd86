"""What a service will need and how long its steps will take, before there is one. See docs/planning.md.

Pure functions of a :class:`Deployment` and a :class:`Machine`; `measure` alone runs anything.
"""
