//go:build tools

// Package tools pins the independent judge of CSI drivers.
package tools

import _ "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity"
