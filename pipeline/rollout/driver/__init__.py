"""What acts on a plan: trains, exports, measures, registers, replays. Deciding is left to the pure functions above.

A room of its own, above `pipeline.job`: it calls the main job, and nothing below calls it.
"""
