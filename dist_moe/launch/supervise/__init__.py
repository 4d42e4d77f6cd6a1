"""Runs a launcher's command, follows its workers, and ends every process of the job when one fails or stops."""
