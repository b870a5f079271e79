package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Histories of one block: `HOST.LIFE op call end what`, where what is w (write), z (write of
// zeroes), r VALUE, w! (a write without an answer), z!, w? (a write that went out twice).
func judged(t *testing.T, history string) *report {
	t.Helper()
	folder := t.TempDir()
	lines := map[string]string{}
	var order []string
	for _, text := range strings.Split(strings.TrimSpace(history), "\n") {
		var host, what string
		var op, call, end, value uint64
		if _, err := fmt.Sscan(text, &host, &op, &call, &end, &what); err != nil {
			t.Fatal(text, err)
		}
		if what == "r" {
			fields := strings.Fields(text)
			if _, err := fmt.Sscan(fields[5], &value); err != nil {
				t.Fatal(text, err)
			}
		}
		if _, known := lines[host]; !known {
			order = append(order, host)
		}
		kind := map[byte]string{'w': "write", 'z': "zero", 'r': "read"}[what[0]]
		said := fmt.Sprintf(`{"at":%d,"op":%d,"do":"%s","block":9,"blocks":1}`+"\n", call, op, kind)
		if strings.HasSuffix(what, "?") {
			said += fmt.Sprintf(`{"at":%d,"op":%d,"is":"again"}`+"\n", call+1, op)
		}
		if strings.HasSuffix(what, "#") {
			why := "NVMe status 0h/81h DNR"
			said += fmt.Sprintf(`{"at":%d,"op":%d,"is":"failed","why":"%s"}`+"\n", end, op, why)
		} else if !strings.HasSuffix(what, "!") {
			values := ""
			if what == "r" {
				values = fmt.Sprintf(`,"values":[%d]`, value)
			}
			said += fmt.Sprintf(`{"at":%d,"op":%d,"is":"done"%s}`+"\n", end, op, values)
		}
		lines[host] += said
	}
	var arguments []string
	for _, host := range order {
		file := filepath.Join(folder, host)
		if err := os.WriteFile(file, []byte(lines[host]), 0o600); err != nil {
			t.Fatal(err)
		}
		name, _, _ := strings.Cut(host, ".")
		arguments = append(arguments, name+"="+file)
	}
	found, err := judge(arguments, 10*time.Second, filepath.Join(folder, "picture.html"))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestVerdicts(t *testing.T) {
	cases := []struct{ name, history, verdict string }{
		{"reads see the last write", `
			a.1 1 0 10 w
			b.1 2 20 30 r 1
			a.1 3 40 50 w
			b.1 4 60 70 r 3`, "linearizable"},
		{"a stale read", `
			a.1 1 0 10 w
			a.1 3 40 50 w
			b.1 4 60 70 r 1`, "not linearizable"},
		{"a write that is lost", `
			a.1 1 0 10 w
			b.1 4 60 70 r 0`, "not linearizable"},
		{"old while a write is under way, but never again after new", `
			a.1 1 0 100 w
			b.1 2 10 20 r 0
			b.1 3 30 40 r 1
			c.1 4 50 60 r 0`, "not linearizable"},
		{"a write without an answer comes late", `
			a.1 1 0 10 w
			b.1 2 0 0 w!
			a.1 3 20 30 r 1
			a.1 4 40 50 r 2`, "linearizable"},
		{"or never", `
			a.1 1 0 10 w
			b.1 2 0 0 w!
			a.1 4 40 50 r 1`, "linearizable"},
		{"but only once", `
			b.1 2 0 0 w!
			a.1 3 20 30 r 2
			a.1 1 40 50 w
			a.1 4 60 70 r 2`, "not linearizable"},
		{"no room, and never seen", `
			a.1 1 0 10 w
			b.1 2 5 20 w#
			a.1 4 40 50 r 1`, "linearizable"},
		{"no room, and seen all the same", `
			a.1 1 0 10 w
			b.1 2 5 20 w#
			a.1 4 40 50 r 2`, "not linearizable"},
		{"no room for zeroes, and seen all the same", `
			a.1 1 0 10 w
			b.1 2 5 20 z#
			a.1 4 40 50 r 0`, "not linearizable"},
		{"zeroes without an answer", `
			a.1 1 0 10 w
			b.1 2 0 0 z!
			a.1 3 20 30 r 1
			a.1 4 40 50 r 0`, "linearizable"},
		{"a value that nobody wrote", `
			a.1 1 0 10 w
			a.1 4 40 50 r 7`, "not linearizable"},
		{"sent twice, another's write in between", `
			a.1 1 0 100 w?
			b.1 2 10 20 w
			c.1 3 30 40 r 2
			c.1 4 110 120 r 1`, "linearizable"},
		{"sent twice, seen twice", `
			a.1 1 0 100 w?
			b.1 5 5 10 r 1
			b.1 2 20 30 w
			c.1 3 40 50 r 2
			c.1 4 110 120 r 1`, "linearizable"},
		{"sent once, seen twice", `
			a.1 1 0 100 w
			b.1 5 5 10 r 1
			b.1 2 20 30 w
			c.1 3 40 50 r 2
			c.1 4 110 120 r 1`, "not linearizable"},
		{"sent twice: the first must not come after the answer (H2)", `
			a.1 1 0 100 w?
			b.1 2 110 120 w
			c.1 4 130 140 r 1`, "not linearizable"},
		{"of a former life, before the next one's first answer (H3)", `
			a.1 1 0 0 w!
			a.2 2 20 50 r 0
			b.1 3 30 40 r 1`, "linearizable"},
		{"of a former life, after the next one's first answer (H3)", `
			a.1 1 0 0 w!
			a.2 2 20 50 r 0
			b.1 4 55 60 r 0
			b.1 3 65 70 r 1`, "not linearizable"},
		{"of a life before the last but one (H3)", `
			a.1 1 0 0 w!
			a.2 2 20 0 w!
			a.3 3 30 40 r 0
			b.1 5 50 55 r 0
			b.1 4 60 70 r 1`, "not linearizable"},
	}
	for _, each := range cases {
		t.Run(each.name, func(t *testing.T) {
			found := judged(t, each.history)
			if found.Verdict != each.verdict {
				t.Fatalf("%s: %s", found.Verdict, strings.Join(found.Story, "\n"))
			}
			isBad := each.verdict == "not linearizable"
			if isBad != (len(found.Bad) == 1 && found.Bad[0] == 9 && len(found.Story) > 1) {
				t.Fatalf("bad %v, story %q", found.Bad, found.Story)
			}
		})
	}
}
