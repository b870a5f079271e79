//go:build tools

// Package tools pins kind, which makes clusters of nodes in containers.
package tools

import _ "sigs.k8s.io/kind"
