// A real server of net/http. Usage: refuse_go serving|loading RECORD; what it does is told in refusals.py.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
)

func run(request *http.Request) string {
	if value := request.Header.Get("X-Run"); value != "" {
		return value
	}
	return "-"
}

func main() {
	loading := os.Args[1] == "loading"
	record, err := os.OpenFile(os.Args[2], os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		panic(err)
	}
	handler := func(response http.ResponseWriter, request *http.Request) {
		fmt.Fprintf(record, "%s %.80s %s\n", request.Method, request.RequestURI, run(request))
		status := http.StatusOK
		switch {
		case loading:
			status = http.StatusServiceUnavailable
		case request.URL.Path == "/early":
			status = http.StatusUnsupportedMediaType
		default:
			io.Copy(io.Discard, request.Body)
		}
		response.Header().Set("Content-Type", "application/json")
		response.WriteHeader(status)
		fmt.Fprintf(response, `{"run":"%s","target":"%.80s"}`, run(request), request.URL.Path)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	go http.Serve(listener, http.HandlerFunc(handler))
	io.Copy(io.Discard, os.Stdin)
}
