"""The policies that come with ersim, one idea per file; `ersim.routing.registry` names them."""
