"""The bundled tiny text-to-image model of coloured shapes: its domain, its build script and its weights."""
