"""The engine core's process: settings of the engine, rows of every step, calibration of tasks."""
