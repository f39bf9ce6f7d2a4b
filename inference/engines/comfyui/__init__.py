"""ComfyUI as an engine: any workflow, or a template of the operator's for tasks that bring only a photo."""
