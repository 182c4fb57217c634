// The judge net/http. Frames and lines are as in judge_python.py.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
)

// The mark for bytes that http.ReadRequest did not take.
func refusal(err error) string {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return "~"
	}
	return "!"
}

func judge(data []byte) string {
	var entries []string
	reader := bufio.NewReader(bytes.NewReader(data))
	for {
		if _, err := reader.Peek(1); err == io.EOF {
			return strings.Join(append(entries, "."), " ")
		}
		request, err := http.ReadRequest(reader)
		if err != nil {
			return strings.Join(append(entries, refusal(err)), " ")
		}
		body, err := io.ReadAll(request.Body)
		if err != nil {
			return strings.Join(append(entries, refusal(err)), " ")
		}
		entries = append(entries, fmt.Sprintf("%x,%x,%x,%x", request.Method, request.RequestURI, request.Host, body))
		if request.Close {
			if _, err := reader.Peek(1); err == nil {
				entries = append(entries, "!")
			} else {
				entries = append(entries, ".")
			}
			return strings.Join(entries, " ")
		}
	}
}

func main() {
	input := bufio.NewReaderSize(os.Stdin, 1<<16)
	output := bufio.NewWriter(os.Stdout)
	var length uint32
	for binary.Read(input, binary.BigEndian, &length) == nil {
		data := make([]byte, length)
		if _, err := io.ReadFull(input, data); err != nil {
			return
		}
		fmt.Fprintln(output, judge(data))
		output.Flush()
	}
}
